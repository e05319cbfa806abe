import json
import math

import numpy as np
import pytest

from monitoring.health import RULES, Health
from monitoring.routing import RoutingSnapshot, routing_drift, routing_measures, routing_record

LAYERS, EXPERTS, TOKENS, TOP_K = 12, 64, 4096, 4
SKEWED = np.random.default_rng(0).dirichlet(np.full(EXPERTS, 0.5), LAYERS)  # healthy, and far from even


def train(step, **values):
    return {"kind": "train", "step": step, "loss": 2.0, "grad_norm": 0.5} | values


def routing(step, counts, base=None, tokens=TOKENS):
    layers = range(LAYERS)
    snapshot = RoutingSnapshot(step, tuple(layers), counts, tokens)
    drift = None
    if base is not None:
        drift = routing_drift(layers=layers, base_counts=base, counts=counts, kept=np.full(LAYERS, 0.9))
    return routing_record(snapshot, routing_measures(snapshot), drift)


def counts_of(shares, tokens=TOKENS):
    return np.floor(shares * tokens * TOP_K).astype(np.int64)


def with_layer_2(share):
    shares = SKEWED.copy()
    shares[2] = share
    return counts_of(shares)


def concentrated(kept):
    """Layer 2 on its first `kept` experts alone, evenly."""
    return with_layer_2(np.where(np.arange(EXPERTS) < kept, 1 / kept, 0.0))


def judge(*records):
    health = Health()
    return [finding for record in records for finding in health.check(record)]


def usual(n=20):
    return [train(step, loss=2.0 + 0.02 * (step % 5), grad_norm=0.5 + 0.01 * (step % 3)) for step in range(n)]


def held_out(step, loss, uneven=0.0):
    """An evaluation of eight batches, which scatter by 0.5 among each other and, if uneven, in how they change."""
    tokens = 1000
    losses = [loss + 0.5 * (-1) ** n + uneven * (7 if n == 0 else -1) for n in range(8)]
    parts = [(value * tokens, tokens) for value in losses]
    return {
        "kind": "eval",
        "step": step,
        "loss": sum(s for s, _ in parts) / (8 * tokens),
        "tokens": 8000,
        "parts": parts,
    }


EVEN = concentrated(EXPERTS)
HEALTHY = counts_of(SKEWED)
HOT = np.full(EXPERTS, 0.85 / (EXPERTS - 1))  # expert 5 takes 15 % of rows: 60 % of tokens choose it
HOT[5] = 0.15
LOST = np.where(np.arange(EXPERTS) < 6, 0.0, 1 / (EXPERTS - 6))  # six experts of an even layer without a row
SHIFTED = np.where(np.arange(EXPERTS) % 2, 1.6, 0.4) / EXPERTS


# rule, level, layer, records that trip it, records just short of it
CASES = [
    ("not_finite", "stop", None, [train(1, loss=math.nan)], [train(1, loss=900.0)]),
    ("not_finite", "stop", None, [train(1, grad_norm=math.inf)], [train(1, grad_norm=None)]),
    (
        "not_finite",
        "stop",
        None,
        [{"kind": "eval", "step": 1, "loss": math.nan}],
        [{"kind": "eval", "step": 1, "loss": 2}],
    ),
    ("loss_spike", "warn", None, [*usual(), train(20, loss=3.0)], [*usual(), train(20, loss=2.4)]),
    ("loss_spike", "warn", None, [*usual(12), train(12, loss=3.0)], [*usual(5), train(5, loss=3.0)]),
    (
        "loss_rise",
        "warn",
        None,
        [*usual(), *(train(20 + n, loss=2.4) for n in range(2))],
        [*usual(), train(20, loss=9.0), *usual(), train(21, loss=9.0)],  # one batch is no rise
    ),
    (
        "loss_rise",
        "alert",
        None,
        [*usual(3), *(train(3 + n, loss=6.0) for n in range(2))],
        [train(0), train(1, loss=9)],
    ),
    ("held_out_rise", "warn", None, [held_out(8, 2.8), held_out(16, 2.9)], [held_out(8, 2.8), held_out(16, 2.82)]),
    ("held_out_rise", "alert", None, [held_out(8, 2.84), held_out(24, 3.07)], [held_out(8, 3.07), held_out(24, 2.84)]),
    (
        "held_out_rise",
        "alert",
        None,
        [held_out(0, 3.1), held_out(8, 2.84), held_out(24, 3.07)],
        [held_out(8, 2.84), held_out(24, 3.07, uneven=0.2)],  # one of eight batches rose: within four standard errors
    ),
    ("grad_norm_spike", "warn", None, [*usual(), train(20, grad_norm=6.0)], [*usual(), train(20, grad_norm=4.0)]),
    (
        "expert_collapse",
        "alert",
        2,
        [routing(10, EVEN), routing(20, concentrated(24)), routing(30, concentrated(24))],
        [routing(10, EVEN), routing(20, concentrated(24)), routing(30, concentrated(60))],  # one window is not enough
    ),
    (
        "expert_collapse",
        "stop",
        2,
        [routing(10, EVEN), routing(20, concentrated(16)), routing(30, concentrated(16))],
        [routing(10, concentrated(16)), routing(20, concentrated(16)), routing(30, concentrated(16))],  # always was so
    ),
    (
        "expert_takeover",
        "warn",
        2,
        [routing(10, EVEN), routing(20, with_layer_2(HOT)), routing(30, with_layer_2(HOT))],
        [routing(n, with_layer_2(HOT)) for n in (10, 20, 30)],
    ),
    (
        "dead_experts",
        "warn",
        2,
        [routing(10, EVEN), routing(20, with_layer_2(LOST)), routing(30, with_layer_2(LOST))],
        [routing(n, with_layer_2(LOST)) for n in (10, 20, 30)],
    ),
    ("drift_from_base", "warn", 2, [routing(10, with_layer_2(SHIFTED), EVEN)], [routing(10, EVEN, EVEN)]),
    (
        "drift_from_base",
        "alert",
        2,
        [routing(10, concentrated(16), EVEN)],
        [routing(10, concentrated(16), concentrated(16))],
    ),
    ("collapse_from_base", "warn", 2, [routing(10, concentrated(50), EVEN)], [routing(10, concentrated(60), EVEN)]),
    (
        "collapse_from_base",
        "stop",
        2,
        [routing(10, concentrated(9), EVEN)],
        [routing(10, concentrated(9), concentrated(9))],
    ),
    (
        "newly_dead_experts",
        "alert",
        2,
        [routing(10, with_layer_2(LOST), EVEN)],
        [routing(10, EVEN, with_layer_2(LOST))],
    ),
]


@pytest.mark.parametrize(
    ("rule", "level", "layer", "trips", "holds"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_rule_trips_on_its_fault_and_not_just_short_of_it(rule, level, layer, trips, holds):
    found = {(f.rule, f.level, f.layer, f.step) for f in judge(*trips)}
    assert (rule, level, layer, trips[-1]["step"]) in found
    assert {f.layer for f in judge(*trips)} == {layer}
    assert rule not in {f.rule for f in judge(*holds)}


def test_every_rule_has_a_case():
    assert {rule.__name__ for rules in RULES.values() for rule in rules} == {case[0] for case in CASES}


def test_every_message_says_where_and_what_to_do():
    for rule, _, layer, trips, _ in CASES:
        (message,) = {f.message for f in judge(*trips) if f.rule == rule and f.step == trips[-1]["step"]}
        assert layer is None or f"layer {layer} " in message
        assert any(verb in message for verb in ("lower ", "resume ", "try "))
        assert "\n" not in message


def test_a_skewed_but_steady_router_never_trips_anything():
    rng = np.random.default_rng(1)
    health = Health()
    for window in range(200):
        counts, probe = (np.stack([rng.multinomial(TOKENS * TOP_K, p) for p in SKEWED]) for _ in range(2))
        assert routing_measures(RoutingSnapshot(0, tuple(range(LAYERS)), counts, TOKENS))[2].max_vio > 3
        # Even another sample of tokens than the base saw stays under four times the noise.
        assert health.check(routing(window, counts)) == []
        assert health.check(routing(window, counts, probe)) == []


def test_a_frozen_router_is_not_to_be_frozen():
    frozen, trained = Health(router_trains=False), Health()
    again = Health(router_trains=False)
    again.restore(trained.state())  # the recipe of this start counts
    bad = [routing(step, concentrated(9), EVEN) for step in (20, 30)]
    for health, advice in (
        (frozen, "what it reads has moved"),
        (again, "what it reads"),
        (trained, "freeze the router"),
    ):
        found = [f for record in (routing(10, EVEN), *bad) for f in health.check(record) if f.level != "info"]
        assert {f.rule for f in found} >= {"drift_from_base", "collapse_from_base", "expert_collapse"}
        assert all(advice in f.message for f in found)
        assert all(("router.train: false" in f.message) == (health is trained) for f in found)


def test_a_small_drift_is_only_information():
    base, moved = EVEN, EVEN.copy()
    moved[2, : EXPERTS // 2] = (moved[2, : EXPERTS // 2] * 1.6).astype(int)
    assert [(f.rule, f.level, f.layer) for f in judge(routing(10, moved, base))] == [("drift_from_base", "info", 2)]


def test_the_collapsed_layer_of_twelve_is_the_one_named():
    for layer in (2, 10, 11):
        bad = EVEN.copy()
        bad[layer] = 0
        bad[layer, :4] = TOKENS
        assert {f.layer for f in judge(routing(10, EVEN), routing(20, bad), routing(30, bad))} == {layer}


def test_a_standing_finding_is_told_once_then_when_worse_then_when_it_returns():
    health = Health()
    worse, worst = concentrated(24), concentrated(12)
    steps = [EVEN, worse, worse, worse, worst, worst, worst, EVEN, EVEN, worst, worst]
    told = [
        (step, f.level)
        for step, counts in enumerate(steps)
        for f in health.check(routing(step, counts))
        if f.rule == "expert_collapse"
    ]
    assert told == [(2, "alert"), (5, "stop"), (10, "stop")]


def test_a_drift_finding_stands_through_windows_that_measure_no_drift():
    bad = concentrated(9)
    found = judge(routing(10, bad, EVEN), routing(20, bad), routing(30, bad, EVEN))
    assert [f.step for f in found if f.rule == "drift_from_base"] == [10]


def test_a_short_last_window_is_not_compared():
    few = concentrated(10) // 10
    assert judge(routing(10, EVEN), routing(20, few, tokens=400), routing(30, few, tokens=400)) == []


def test_a_resumed_run_continues_from_the_state_in_its_checkpoint():
    killed = Health()
    for record in [*usual(), routing(10, EVEN), routing(20, concentrated(24)), routing(30, concentrated(24))]:
        killed.check(record)
    health = Health()
    health.restore(json.loads(json.dumps(killed.state(), allow_nan=False)))
    assert health.state() == killed.state()
    assert health.check(routing(40, concentrated(24))) == []  # told before the kill
    assert health.check(routing(50, concentrated(4))) == []
    worse = health.check(routing(60, concentrated(4)))  # compared with the first window, of before the kill
    assert [(f.rule, f.level) for f in worse] == [("expert_collapse", "stop"), ("expert_takeover", "alert")]
    assert [f.rule for f in health.check(train(61, loss=5.0))] == ["loss_spike"]


def test_a_finding_is_a_line_of_the_file():
    (finding,) = judge(train(7, loss=math.nan))
    record = finding.record()
    assert list(record) == ["kind", "step", "level", "rule", "layer", "message"]
    assert (record["kind"], record["step"], record["level"], record["layer"]) == ("finding", 7, "stop", None)


def test_a_loss_that_is_not_finite_before_the_first_step_is_not_blamed_on_the_optimizer() -> None:
    for step in (0, 5):
        record = {"kind": "eval", "step": step, "loss": math.nan}
        (overflow,) = Health().check({**record, "broken_weights": None})
        assert "every weight is finite, so numbers overflow on the way through the model; try " in overflow.message
        assert ("another copy of the base" in overflow.message) == (step == 0)
        (broken,) = Health().check({**record, "broken_weights": "1 weights hold undefined numbers: model.norm.weight"})
        assert broken.message == f"loss is nan at step {step}: 1 weights hold undefined numbers: model.norm.weight"
        assert "optim.lr" not in overflow.message + broken.message
    (later,) = Health().check(train(5, loss=math.nan))
    assert "resume from the last checkpoint with a lower optim.lr" in later.message
