"""The benchmark of the LoRA step on a tiny model: its contenders are one model, and a wrong one has no row."""

from typing import Any

import pytest
import torch

from benchmarks.lora_models import FULL, flops_per_token
from benchmarks.lora_step import BASE, RefusedError, check, extrapolate, key, table
from benchmarks.lora_worker import Bench, Setting
from tests.configs import tiny_config

NAMES = ("transformers_peft", "nextune", "nextune_no_recompute")
STEPS = 6


def row(
    name: str, values: dict[str, Any], dtype: torch.dtype, *, zipf: bool = False, shape: tuple[int, int] = (2, 70)
) -> dict[str, Any]:
    """What `lora_step.measure` would report of a contender, as far as `check` reads it."""
    bench = Bench(name, Setting(values, values["num_hidden_layers"], "cpu", dtype, threads=1))
    return started(bench, values, zipf=zipf, shape=shape)


def started(
    bench: Bench, values: dict[str, Any], *, zipf: bool = False, shape: tuple[int, int] = (2, 70)
) -> dict[str, Any]:
    probe = bench.start(*shape, values["num_hidden_layers"], zipf=zipf)
    losses = bench.turn(STEPS).losses
    return {
        "token_losses": " ".join(map(str, probe)), "loss_first": losses[0], "loss_last": losses[-1], "steps": STEPS
    }  # fmt: skip


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    # Widths that the grouped product takes, and a head that tells tokens apart.
    return tiny_config(hidden_size=64, num_experts=16, num_experts_per_tok=4, vocab_size=512)


@pytest.fixture(scope="module")
def base(values: dict[str, Any]) -> dict[str, Any]:
    return row("transformers_peft", values, torch.float32)


@pytest.mark.parametrize("name", NAMES[1:])
def test_contenders_are_one_model(name: str, values: dict[str, Any], base: dict[str, Any]) -> None:
    found = row(name, values, torch.float32)
    theirs, ours = ([float(loss) for loss in r["token_losses"].split()] for r in (base, found))
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 1e-4
    assert found["loss_last"] == pytest.approx(base["loss_last"], abs=1e-4)
    assert found["loss_first"] - found["loss_last"] > 0
    check(found, base)


def test_bfloat16_passes_the_gate(values: dict[str, Any]) -> None:
    """Rounding, and the few choices of experts that it changes, stay within the tolerances."""
    theirs, ours = (row(name, values, torch.bfloat16, shape=(4, 150)) for name in NAMES[:2])
    check(ours, theirs)


def test_uneven_load_is_the_same_everywhere(values: dict[str, Any]) -> None:
    theirs = row("transformers_peft", values, torch.float32, zipf=True)
    bench = Bench("nextune", Setting(values, values["num_hidden_layers"], "cpu", torch.float32, threads=1))
    even = (started(bench, values), bench.load())
    uneven = (started(bench, values, zipf=True), bench.load())
    check(uneven[0], theirs)
    assert even[1] is not None
    assert uneven[1] is not None
    assert uneven[1] > 1.5 * even[1]


def test_fewer_layers_are_the_shorter_model(values: dict[str, Any]) -> None:
    """Cut from a deeper one, it gives the losses of one that was built shorter, in both codes."""
    deep = {**values, "num_hidden_layers": 8}
    for name in NAMES[:2]:
        bench = Bench(name, Setting(deep, 8, "cpu", torch.float32, threads=1))
        bench.start(2, 70, 8, zipf=False)
        bench.turn(1)
        assert started(bench, values) == row(name, values, torch.float32)


@pytest.mark.parametrize("fault", ["norm", "gate", "decay", "learning", "steps"])
def test_a_wrong_contender_has_no_row(fault: str, values: dict[str, Any], base: dict[str, Any]) -> None:
    bench = Bench("nextune", Setting(values, values["num_hidden_layers"], "cpu", torch.float32, threads=1))
    bench.start(2, 70, 4, zipf=False)
    if fault == "learning":  # right forward, half of the gradient
        for name, parameter in bench.contender.model.named_parameters():
            if "in_proj_qkvz.lora" in name:
                parameter.register_hook(torch.zeros_like)
    elif fault != "steps":
        break_it(bench, fault)
    found = started_without_filling(bench) if fault not in ("learning", "steps") else started(bench, values)
    if fault == "steps":
        found["steps"] += 1
    with pytest.raises(RefusedError):
        check(found, base)


def break_it(bench: Bench, fault: str) -> None:
    """Another convention than the released one."""
    with torch.no_grad():
        for name, parameter in bench.contender.model.named_parameters():
            if fault == "norm" and name.endswith("linear_attn.norm.weight"):
                parameter.add_(1)
            elif fault == "gate" and name.endswith("gate_up_proj"):
                parameter.copy_(torch.cat(parameter.chunk(2, dim=1)[::-1], dim=1))
            elif fault == "decay" and name.endswith("A_log"):
                parameter.fill_(-20)


def started_without_filling(bench: Bench) -> dict[str, Any]:
    positions = torch.arange(64) * 69 // 64
    with torch.no_grad():
        logits = bench.contender.logits(bench.ids, positions).flatten(0, 1)
    probe = torch.nn.functional.cross_entropy(logits, bench.ids[:, positions + 1].flatten(), reduction="none")
    losses = bench.turn(STEPS).losses
    return {
        "token_losses": " ".join(map(str, probe.tolist())), "loss_first": losses[0], "loss_last": losses[-1],
        "steps": STEPS,
    }  # fmt: skip


def test_a_row_needs_the_base_peer(base: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=BASE):
        check(base, None)


def test_operations_of_a_token() -> None:
    """16.33 and 20.56 GFLOP for the whole model at 4,096 and 16,384 tokens."""
    assert flops_per_token(FULL, 48, 4096) == pytest.approx(16.33e9, rel=1e-3)
    assert flops_per_token(FULL, 48, 16384) == pytest.approx(20.56e9, rel=1e-3)


def test_48_layers_from_8_and_4() -> None:
    case = {"shape": "4x4096", "routing": "uniform", "peak_gib": 1.0, "mfu": 0.1, "spread": 0.1, "tokens_per_second": 1}
    rows = [
        {"name": name, "layers": layers, "milliseconds": ms, **case}
        for name, layers, ms in ((BASE, 8, 573), (BASE, 4, 323), ("nextune", 8, 305), ("nextune", 4, 176))
    ]
    by_key = {key(row): row for row in rows}
    extrapolate(by_key)
    assert rows[0]["extrapolated_48_layers"]["milliseconds"] == 3073
    assert rows[0]["extrapolated_48_layers"]["tokens_per_second"] == pytest.approx(5332, abs=1)
    assert rows[0]["extrapolated_48_layers"]["mfu"] == pytest.approx(0.109, abs=1e-3)
    assert "1.88" in table(rows)
