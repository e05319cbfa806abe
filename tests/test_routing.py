import json
import math

import numpy as np
import pytest

from monitoring.files import MonitoringError
from monitoring.routing import (
    RoutingSnapshot,
    jensen_shannon_bits,
    noise_floor_bits,
    read_snapshot,
    recorded_drift,
    routing_drift,
    routing_measures,
    routing_record,
    snapshot_path,
    write_snapshot,
)

EXPERTS = 512


def measure(counts, tokens=None):
    counts = np.asarray(counts)
    return routing_measures(RoutingSnapshot(1, (0,), counts[None], tokens or int(counts.sum())))[0]


@pytest.mark.parametrize("used", [1, 7, 32, EXPERTS])
def test_load_spread_evenly_over_some_experts_has_the_closed_form(used):
    counts = np.zeros(EXPERTS, dtype=np.int64)
    counts[np.random.default_rng(0).permutation(EXPERTS)[:used]] = 12
    m = measure(counts)
    assert m.effective_experts == pytest.approx(used)
    assert m.max_vio == pytest.approx(EXPERTS / used - 1)
    assert m.cv == pytest.approx(math.sqrt(EXPERTS / used - 1))
    assert m.max_share == pytest.approx(1 / used)
    assert (m.dead, m.starved, m.rows) == (EXPERTS - used, 0, 12 * used)
    assert m.load_share.sum() == pytest.approx(1)


def test_uneven_load_agrees_with_the_definitions():
    counts = np.random.default_rng(0).integers(100, 900, 32)
    counts[5], counts[9] = 3, 0
    m, share = measure(counts, tokens=4000), counts / counts.sum()
    assert m.effective_experts == pytest.approx(np.prod(share[share > 0] ** -share[share > 0]))  # exp(-sum p ln p)
    assert m.max_vio == pytest.approx(32 * share.max() - 1)
    assert m.cv == pytest.approx(np.sqrt(((32 * share - 1) ** 2).mean()))
    assert m.max_token_share == pytest.approx(counts.max() / 4000)
    assert m.busiest_expert == counts.argmax()
    assert m.dead == (counts == 0).sum() == 1
    assert m.starved == sum(0 < c < counts.sum() / 32 / 100 for c in counts) == 1


def test_a_layer_without_rows_has_finite_measures():
    m = measure(np.zeros(8, dtype=np.int64))
    values = (m.rows, m.max_share, m.max_token_share, m.effective_experts, m.max_vio, m.cv, m.starved)
    assert values == (0,) * 7
    assert m.dead == 8


def test_layers_are_ordered_by_number_and_keep_their_own_counts():
    as_text = sorted(range(12), key=str)  # 0, 1, 10, 11, 2, ...
    counts = np.array([[layer, 100 - layer] for layer in as_text])
    snapshot = RoutingSnapshot(1, tuple(as_text), counts, 100)
    assert snapshot.layers == tuple(range(12))
    assert snapshot.counts[:, 0].tolist() == list(range(12))
    assert [(m.layer, round(m.max_share * 100)) for m in routing_measures(snapshot)] == [
        (n, 100 - n) for n in range(12)
    ]
    drift = routing_drift(layers=as_text, base_counts=counts, counts=counts, kept=np.array(as_text) / 100)
    assert [(d.layer, d.kept) for d in drift] == [(n, n / 100) for n in range(12)]


def test_layer_numbers_are_the_true_ones_where_some_layers_are_dense():
    snapshot = RoutingSnapshot(1, (47, 3, 12), np.ones((3, 4), dtype=np.int64), 4)
    assert [entry["layer"] for entry in routing_record(snapshot, routing_measures(snapshot))["layers"]] == [3, 12, 47]


@pytest.mark.parametrize("layers", [(0, 0), (0,), (0, 1, 2)])
def test_a_snapshot_refuses_layers_that_do_not_fit_its_counts(layers):
    with pytest.raises(AssertionError, match="counts for layers"):
        RoutingSnapshot(1, layers, np.ones((2, 4), dtype=np.int64), 4)


def test_divergence_is_0_when_equal_1_bit_when_disjoint_and_the_mean_relative_entropy_between():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(64)), rng.dirichlet(np.ones(64))
    middle = (p + q) / 2
    assert jensen_shannon_bits(p, p) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon_bits(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)
    by_definition = ((p * np.log2(p / middle)).sum() + (q * np.log2(q / middle)).sum()) / 2
    assert jensen_shannon_bits(p, q) == pytest.approx(by_definition)


def test_divergence_of_two_samples_of_one_router_is_the_noise_floor():
    rng, rows = np.random.default_rng(0), 163_840
    p = rng.dirichlet(np.full(EXPERTS, 5.0))
    samples = [(rng.multinomial(rows, p) / rows, rng.multinomial(rows, p) / rows) for _ in range(8)]
    mean = np.mean([jensen_shannon_bits(a, b) for a, b in samples])
    assert mean == pytest.approx(noise_floor_bits(experts=EXPERTS, rows=rows), rel=0.1)


def drift(base, now, **more):
    base, now = np.asarray(base)[None], np.asarray(now)[None]
    return routing_drift(layers=[3], base_counts=base, counts=now, kept=np.array([0.5]), **more)[0]


def test_an_unmoved_layer_has_no_drift():
    d = drift(np.arange(16), np.arange(16))
    assert (d.layer, d.load_bits, d.busiest_kept, d.effective_ratio, d.newly_dead, d.gained) == (3, 0, 1, 1, 0, ())
    assert d.probability_bits is None


def test_drift_counts_what_died_and_names_what_gained():
    base, now = np.full(16, 100), np.full(16, 100)
    base[:3] = (4, 5, 500)  # too few rows to call the loss a death; just enough; the busiest
    now[:3] = (0, 0, 100)
    now[7], now[9] = 900, 300
    d = drift(base, now)
    assert d.newly_dead == 1
    assert d.gained[:2] == (7, 9)
    assert d.busiest_kept == 0
    assert d.load_bits == pytest.approx(jensen_shannon_bits(base / base.sum(), now / now.sum()))
    assert d.effective_ratio == pytest.approx(measure(now).effective_experts / measure(base).effective_experts)


def test_drift_of_router_probabilities_is_measured_when_given():
    even, counts = np.full((1, 4), 0.25, dtype=np.float32), np.full(4, 9)
    one = np.array([[1, 0, 0, 0]], dtype=np.float32)
    same = drift(counts, counts, base_probabilities=even, probabilities=even)
    moved = drift(counts, counts, base_probabilities=even, probabilities=one)
    assert same.probability_bits == pytest.approx(0, abs=1e-9)
    assert moved.probability_bits == pytest.approx(jensen_shannon_bits(even[0], one[0]), abs=1e-6)
    assert moved.load_bits == 0


def test_the_record_carries_drift_beside_the_layer_it_belongs_to():
    counts = np.array([[1, 3], [2, 2]])
    snapshot = RoutingSnapshot(50, (4, 2), counts, 4)
    moved = routing_drift(layers=(4, 2), base_counts=counts, counts=counts, kept=np.array([0.25, 1.0]))
    record = routing_record(snapshot, routing_measures(snapshot), moved)
    assert (record["kind"], record["step"], record["tokens"], record["experts"]) == ("routing", 50, 4, 2)
    assert [(e["layer"], e["max_share"], e["drift"]["kept"]) for e in record["layers"]] == [
        (2, 0.5, 1.0),
        (4, 0.75, 0.25),
    ]
    assert recorded_drift(json.loads(json.dumps(record))) == moved
    without = routing_record(snapshot, routing_measures(snapshot))
    assert "drift" not in without["layers"][0]
    assert recorded_drift(without) == []


def test_a_snapshot_survives_its_file(tmp_path):
    counts = np.random.default_rng(0).integers(0, 2**40, (3, 512))
    path = snapshot_path(tmp_path, 50)
    write_snapshot(path, RoutingSnapshot(50, (11, 2, 7), counts, 123))
    again = read_snapshot(path)
    assert path.name == "step-00000050.npz"
    assert (again.step, again.layers, again.tokens) == (50, (2, 7, 11), 123)
    assert again.counts.dtype == np.int64
    assert np.array_equal(again.counts, counts[[1, 2, 0]])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_a_file_that_is_no_snapshot_is_one_sentence(tmp_path, damage):
    path = tmp_path / "step-00000001.npz"
    if damage == "cut":
        write_snapshot(path, RoutingSnapshot(1, (0,), np.ones((1, 64)), 1))
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "empty":
        path.touch()
    elif damage == "other":
        np.savez(path, something=np.ones(3))
    with pytest.raises(
        MonitoringError, match="no such file" if damage == "missing" else "not a routing snapshot"
    ) as info:
        read_snapshot(path)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)
