"""The training line and the routing record of a window, also of one that spans a restart."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.load import load_recipe
from finetune.training import totals as window
from finetune.training.journal import Journal
from finetune.training.reports import Reports
from finetune.training.router_loss import count_rows
from tests.commands import ROOT
from tests.configs import CONFIGS, randomise
from tests.test_window import alone, batch_of

BATCH = batch_of([[7, 1, 9], [20]], 0)
TOKENS = 37


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with alone() as found:
        yield found


class Time:
    """Stands for `time`: passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(window, "time", made)
    return made


class Written:
    """A journal that keeps the records."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.lines.append(record)

    def routing(self, snapshot: Any, drifts: Any) -> None:
        self.lines.append({"kind": "routing", "step": snapshot.step})


@pytest.fixture(scope="module")
def model() -> HybridMoEForCausalLM:
    made = HybridMoEForCausalLM(ModelConfig.from_dict(CONFIGS["dense-layers"]))
    randomise(made, seed=1)
    return made


def reports(world: World, model: HybridMoEForCausalLM, *settings: str) -> Reports:
    probe = Batch(*(tensor[:1] for tensor in BATCH))
    every = ("train.log_every_steps=4", "monitor.routing_every_steps=0", "monitor.drift_every_steps=2")
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [*every, "train.steps=40", *settings], check_paths=False)
    return Reports(recipe, world, model, probe)


@torch.no_grad()
def step(reports: Reports, model: HybridMoEForCausalLM, time: Time, seconds: float) -> None:
    output = model(BATCH.input_ids, BATCH.segment_ids, labels=BATCH.labels)
    reports.windows.add(output, BATCH, count_rows(output.routings))
    time.now += seconds


def after_restart(world: World, model: HybridMoEForCausalLM, stored: Reports) -> Reports:
    """What another process makes of the checkpoint of these reports."""
    made = reports(world, model)
    made.windows.sums.copy_(stored.windows.sums)
    made.restore(stored.state())
    return made


def test_a_window_that_spans_a_restart_lasts_as_long_as_its_steps_took(
    world: World, model: HybridMoEForCausalLM, time: Time
) -> None:
    first = reports(world, model)
    first.clock.start()
    first.grad_norm = 3.0
    for _ in range(3):
        step(first, model, time, seconds=10)
    with first.clock.stopped():
        time.now += 500  # a checkpoint is begun
        second = after_restart(world, model, first)
    time.now += 9000  # the run is killed, and started again
    second.clock.start()
    step(second, model, time, seconds=2)
    written = Written()
    assert second.write(cast(Journal, written), 4, lr=1e-3)
    (line,) = [line for line in written.lines if line["kind"] == "train"]
    assert (line["tokens"], line["seconds"]) == (4 * TOKENS, 32)
    assert line["tokens_per_second"] == 4 * TOKENS / 32
    assert line["grad_norm"] == 3.0  # of the last finite step, which the process before took


def test_a_checkpoint_without_the_seconds_begins_the_window_anew(
    world: World, model: HybridMoEForCausalLM, time: Time
) -> None:
    first = reports(world, model)
    first.clock.start()
    step(first, model, time, seconds=10)
    second = reports(world, model)
    second.windows.sums.copy_(first.windows.sums)
    second.restore(None)
    second.clock.start()
    step(second, model, time, seconds=2)
    written = Written()
    second.write(cast(Journal, written), 4, lr=1e-3)
    assert [(line["tokens"], line["seconds"]) for line in written.lines if line["kind"] == "train"] == [(TOKENS, 2)]


def test_what_is_no_training_does_not_count(world: World, model: HybridMoEForCausalLM, time: Time) -> None:
    made = reports(world, model)
    made.clock.start()
    written = Written()
    probe = made._drift

    def slow() -> Any:
        time.now += 100
        return probe()

    made._drift = slow  # type: ignore[method-assign]
    for number in range(1, 9):
        step(made, model, time, seconds=1)
        with made.clock.stopped():
            time.now += 50  # an evaluation, or the start of a checkpoint
        made.write(cast(Journal, written), number, lr=1e-3)
    found = [(line["step"], line["tokens"], line["seconds"]) for line in written.lines if line["kind"] == "train"]
    assert found == [(1, TOKENS, 1), (4, 3 * TOKENS, 3), (8, 4 * TOKENS, 4)]
    assert [line["step"] for line in written.lines if line["kind"] == "routing"] == [2, 4, 6, 8]
