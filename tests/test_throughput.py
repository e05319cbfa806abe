"""The plan's tokens a second against every run that was measured, and what it says where nothing was."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from finetune.model.config import ModelConfig
from finetune.plan import throughput
from finetune.plan.exchange import Links
from finetune.plan.planner import Plan, plan
from finetune.plan.report import render
from finetune.plan.throughput import EXTRAPOLATED_MARGIN, RESULTS, SOURCE, Estimate, form_of, measured_rows
from finetune.plan.workload import GIB, Machine
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import CHECKOUT

REFERENCE = json.loads(throughput.REFERENCE.read_text())
ROWS = [row for row in json.loads(RESULTS.read_text())["rows"] if row["measured"]]
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
# Measured beside those of the file, and not used for the fit: (device, cards, expert, layers), tokens a second.
OTHERS = [((H200, 1, 1, 16), 61_500), ((H200, 2, 2, 16), 79_500), ((H100, 1, 1, 12), 77_700)]


def planned(
    device: str, cards: int, expert: int, layers: int, *settings: str, tokens: int = 4096, batch: int = 16_384
) -> Plan:
    """The plan of the job that `benchmarks.real_job` measures."""
    config = ModelConfig.from_dict({**REFERENCE, "num_hidden_layers": layers})
    sizes = {"ranks": cards, "expert": expert}
    words = [f"parallel.{key}={value}" for key, value in sizes.items()]
    words += [f"train.sequence_tokens={tokens}", f"train.micro_batch_tokens={batch}"]
    words += [f"train.global_batch_tokens={2 * cards * batch}", *settings]
    recipe = load_recipe(CHECKOUT / "recipes" / "code.yaml", words)
    machine = Machine(
        ranks=cards,
        ranks_per_node=min(8, cards),
        device_name=device,
        device_bytes=(141 if "H200" in device else 80) * GIB,
    )
    return plan(config, recipe, machine)


def rates(made: Plan) -> tuple[float, float]:
    """The range that the plan prints."""
    found = re.search(r"\(([\d,]+) to ([\d,]+) tokens/s\)", render(made))
    assert found, render(made)
    slow, fast = (float(number.replace(",", "")) for number in found.groups())
    assert slow > (1 - EXTRAPOLATED_MARGIN) / (1 + EXTRAPOLATED_MARGIN) * fast * 0.999
    return slow, fast


def test_there_are_runs_of_one_and_of_several_cards() -> None:
    assert {row["cards"] for row in ROWS} >= {1, 2}
    assert {row["expert"] for row in ROWS} >= {1, 2}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['device']}-{row['cards']}-{row['expert']}-{row['layers']}")
def test_every_measured_run_is_in_the_range_of_its_plan(row: dict[str, Any]) -> None:
    form = {"plain": ("kernels.experts=grouped", "kernels.layers=plain", "kernels.mixers=plain")}
    settings = (
        *form.get(row.get("kernels", "fused"), ()),
        *re.findall(r"--set (train\.recompute=\S+)", row["command"]),
    )
    batch = row["micro_batch_tokens"]
    made = planned(
        *(row["device"], row["cards"], row["expert"], row["layers"]),
        *settings,
        f"train.global_batch_tokens={row['accumulation'] * row['cards'] * batch}",
        tokens=row["sequence_tokens"],
        batch=batch,
    )
    slow, fast = rates(made)
    assert slow <= row["tokens_per_second"] <= fast
    assert f"({SOURCE}), within " in render(made)
    if row["recompute"] == "nothing":
        assert (fast - slow) / (fast + slow) == pytest.approx(0.10, abs=0.001)
        assert "source of the time: from runs of the real command on" in render(made)


@pytest.mark.parametrize(("job", "measured"), OTHERS)
def test_a_run_that_the_fit_never_saw_is_in_the_range_and_called_extrapolated(
    job: tuple[str, int, int, int], measured: int
) -> None:
    made = planned(*job)
    slow, fast = rates(made)
    assert slow <= measured <= fast
    assert "source of the time: extrapolated to" in render(made) or job[3] in {row["layers"] for row in ROWS}


def step_rows() -> list[dict[str, Any]]:
    """Steps of the bare model on an H100, measured by another benchmark: recompute, length and depth differ."""
    rows = json.loads((CHECKOUT / "benchmarks/results/lora_step_h100.json").read_text())["rows"]
    return [row for row in rows if row["name"] in ("nextune_full_recompute", "nextune_no_recompute")]


@pytest.mark.parametrize("row", step_rows(), ids=lambda r: f"{r['name']}-{r['shape']}-{r['layers']}-{r['routing']}")
def test_recompute_length_and_depth_change_the_time_as_another_benchmark_measured(row: dict[str, Any]) -> None:
    count, tokens = map(int, row["shape"].split("x"))
    again = "train.recompute=full" if "full" in row["name"] else "train.recompute=none"
    made = planned(H100, 1, 1, row["layers"], again, tokens=tokens, batch=count * tokens)
    slow, fast = rates(made)
    assert slow <= row["tokens_per_second"] <= fast


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (("NVIDIA A100", 1, 1, 8), "NVIDIA A100 was not measured"),
        (("NVIDIA H100 PCIe", 1, 1, 8), "NVIDIA H100 PCIe was not measured"),
        ((H200, 1, 1, 8, "lora=null"), "full-parameter training was not measured"),
        ((H200, 1, 1, 8, "parallel.offload=cpu"), "an optimizer state outside the GPU was not measured"),
        ((H200, 1, 1, 8, "model.dtype=float32"), "float32 was not measured on a GPU"),
        ((H200, 1, 1, 8, "kernels.mixers=plain"), "fused and plain kernels together were not measured"),
        ((H200, 1, 1, 8, "train.sequence_tokens=2048", "train.micro_batch_tokens=2048"), "under 8,192 tokens were not"),
    ],
)
def test_nothing_is_estimated_where_nothing_like_it_was_measured(made: tuple[Any, ...], words: str) -> None:
    text = render(planned(*made))
    assert "tokens/s)" not in text
    assert re.search(f"time: no estimate; .*{re.escape(words)}", text)


def test_plain_kernels_have_a_range_of_their_own_or_none() -> None:
    made = planned(H200, 1, 1, 8, "kernels.experts=loop", "kernels.layers=plain", "kernels.mixers=plain")
    assert form_of(made.work.recipe) == "plain"
    if any(row.get("kernels") == "plain" for row in ROWS):
        assert rates(made)[1] < rates(planned(H200, 1, 1, 8))[0]
    else:
        assert "time: no estimate; the plain kernels were not measured" in render(made)


def test_cards_known_by_their_memory_alone_are_taken_for_those_that_were_measured() -> None:
    made = planned("GPU with 80 GiB", 8, 8, 48, tokens=8192, batch=8192)
    rates(made)
    for words in ("extrapolated to GPU with 80 GiB", "8 cards with expert parallel 8", "48 layers"):
        assert words in render(made)


def test_the_exchange_slows_a_run_and_over_a_network_needs_its_speed() -> None:
    alone, shared = (planned(H200, 8, expert, 12).throughput for expert in (1, 8))
    assert isinstance(alone, Estimate)
    assert isinstance(shared, Estimate)
    assert shared.fastest < alone.slowest
    two = planned(H200, 16, 16, 12)
    assert "--network-gbit" in str(two.throughput)
    known = [
        replace(
            two, work=replace(two.work, machine=replace(two.work.machine, links=Links(network_gbit=gbit)))
        ).throughput
        for gbit in (3200, 800)
    ]
    fast, slow = (speed.fastest for speed in known if isinstance(speed, Estimate))
    assert slow < fast


def test_without_its_file_nothing_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "RESULTS", CHECKOUT / "nowhere.json")
    measured_rows.cache_clear()
    try:
        assert "time: no estimate; " in render(planned(H200, 1, 1, 8))
    finally:
        measured_rows.cache_clear()
