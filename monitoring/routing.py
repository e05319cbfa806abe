"""Measures of expert load, and of its drift from the frozen base, computed from counts.

Counts are the rows that each expert received since the last logging step: over all micro-batches and ranks, without
padding, each row once. They are already summed over ranks; nothing in this file communicates.

A healthy router is uneven on a narrow domain, so the measures of one snapshot describe and do not judge.
`routing_drift` measures change, by comparison with the frozen base on the same tokens.
"""

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.files import MonitoringError, replace_file
from monitoring.json_file import FileError, MissingFileError, read_bytes

# Exceptions of numpy, zipfile and zlib for a damaged archive.
DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, tokenize.TokenError, struct.error, EOFError, KeyError),
    *(ValueError, TypeError, OSError, SyntaxError, RuntimeError, OverflowError, MemoryError, IndexError),
)
STARVED_BELOW = 0.01  # relative to the mean load
ALIVE_IN_BASE_ROWS = 5  # an expert with fewer rows can lose them in a probe by chance


@dataclass(frozen=True, eq=False)
class RoutingSnapshot:
    """Rows received by every expert of every MoE layer in one window of training, layers in numeric order."""

    step: int
    layers: tuple[int, ...]  # numbers in the model; dense layers are absent
    counts: NDArray[np.int64]  # (layers, experts)
    tokens: int  # non-padding tokens of the window; each makes top_k rows in every layer

    def __post_init__(self) -> None:
        layers, counts = np.asarray(self.layers, dtype=np.int64), np.asarray(self.counts, dtype=np.int64)
        assert counts.ndim == 2, f"counts must be (layers, experts), not {counts.shape}"
        assert 0 < counts.shape[0] == layers.size == np.unique(layers).size, (
            f"{counts.shape} counts for layers {layers}"
        )
        order = np.argsort(layers)  # numerically: as text, layer 10 would come before layer 2
        object.__setattr__(self, "layers", tuple(layers[order].tolist()))
        object.__setattr__(self, "counts", counts[order])

    @property
    def experts(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True, eq=False)
class LayerMeasures:
    """The distribution of one layer's load. All shares of a layer without rows are 0."""

    layer: int
    rows: int
    load_share: NDArray[np.float64]  # (experts,), sums to 1
    busiest_expert: int
    max_share: float  # fraction of rows; at most 1 / top_k
    max_token_share: float  # fraction of tokens that chose the busiest expert; at most 1
    effective_experts: float  # exp(entropy of the load share): all experts if even, 1 if one receives all rows
    max_vio: float  # max / mean - 1: 0 if even
    cv: float  # standard deviation / mean
    dead: int  # experts without a row
    starved: int  # experts with rows, but fewer than 1 % of the mean


@dataclass(frozen=True)
class LayerDrift:
    """The difference between one layer's routing and that of the frozen base on the same probe tokens."""

    layer: int
    load_bits: float  # Jensen-Shannon divergence of the load shares: 0 if equal, 1 if disjoint
    noise_bits: float  # expected divergence of two independent samples of this number of rows from one router
    kept: float  # fraction of (token, choice) slots whose expert the base also chooses for that token
    probability_bits: float | None  # Jensen-Shannon divergence of the mean router probabilities
    busiest_kept: float  # fraction of the base's busiest eighth of experts that is still in the busiest eighth
    effective_ratio: float  # effective experts now / in the base
    newly_dead: int  # experts without a row that receive at least 5 in the base
    gained: tuple[int, ...]  # up to three experts with the largest growth of load share


def routing_measures(snapshot: RoutingSnapshot) -> list[LayerMeasures]:
    """The measures of every layer, in the snapshot's order."""
    return [
        _measure(layer, counts, snapshot.tokens) for layer, counts in zip(snapshot.layers, snapshot.counts, strict=True)
    ]


def _measure(layer: int, counts: NDArray[np.int64], tokens: int) -> LayerMeasures:
    rows, mean, share = int(counts.sum()), counts.mean(), load_share(counts)
    return LayerMeasures(
        layer=layer,
        rows=rows,
        load_share=share,
        busiest_expert=int(counts.argmax()),
        max_share=float(share.max()),
        max_token_share=float(counts.max() / tokens) if tokens else 0.0,
        effective_experts=effective_experts(share),
        max_vio=float(counts.max() / mean - 1) if rows else 0.0,
        cv=float(counts.std() / mean) if rows else 0.0,
        dead=int((counts == 0).sum()),
        starved=int(((counts > 0) & (counts < STARVED_BELOW * mean)).sum()),
    )


def load_share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The fraction of rows that each expert received; zeros if there were none."""
    rows = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)


def effective_experts(share: NDArray[np.float64]) -> float:
    """exp(entropy): the number of equally loaded experts with the same entropy; 0 if there were no rows."""
    return float(np.exp(_entropy_nats(share))) if share.any() else 0.0


def jensen_shannon_bits(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """H((p + q) / 2) - (H(p) + H(q)) / 2 in bits: 0 if equal, 1 if disjoint. Both must sum to 1."""
    nats = _entropy_nats((p + q) / 2) - (_entropy_nats(p) + _entropy_nats(q)) / 2
    return float(np.clip(nats / np.log(2), 0.0, 1.0))


def _entropy_nats(p: NDArray[np.float64]) -> float:
    used = p[p > 0]
    return -float((used * np.log(used)).sum())


def routing_drift(
    *,
    layers: Sequence[int],
    base_counts: NDArray[np.int64],
    counts: NDArray[np.int64],
    kept: NDArray[np.floating[Any]],
    base_probabilities: NDArray[np.floating[Any]] | None = None,
    probabilities: NDArray[np.floating[Any]] | None = None,
) -> list[LayerDrift]:
    """The drift of every layer on one set of probe tokens, layers in numeric order.

    Args:
        base_counts: (layers, experts) rows of each expert in the frozen base (adapters off).
        counts: likewise in the trained model, on the same tokens.
        kept: (layers,) fraction of (token, choice) slots whose expert the base also chooses for that token.
        base_probabilities: (layers, experts) mean router probabilities of the base over the probe tokens.
        probabilities: likewise of the trained model.
    """
    assert len(layers) == len(base_counts) == len(counts) == len(kept), "one row of every array for each layer"
    order = np.argsort(np.asarray(layers)).tolist()
    drifts = [_drift(int(layers[row]), base_counts[row], counts[row], float(kept[row])) for row in order]
    if base_probabilities is None or probabilities is None:
        return drifts
    moved = [_probability_bits(base_probabilities[row], probabilities[row]) for row in order]
    return [replace(drift, probability_bits=bits) for drift, bits in zip(drifts, moved, strict=True)]


def _drift(layer: int, base_counts: NDArray[np.int64], counts: NDArray[np.int64], kept: float) -> LayerDrift:
    before, now = load_share(base_counts), load_share(counts)
    routed = bool(before.any() and now.any())
    return LayerDrift(
        layer=layer,
        load_bits=jensen_shannon_bits(before, now) if routed else 0.0,
        noise_bits=noise_floor_bits(experts=counts.size, rows=int(base_counts.sum())),
        kept=kept,
        probability_bits=None,
        busiest_kept=_busiest_kept(before, now),
        effective_ratio=effective_experts(now) / effective_experts(before) if routed else 1.0,
        newly_dead=int(((counts == 0) & (base_counts >= ALIVE_IN_BASE_ROWS)).sum()) if routed else 0,
        gained=tuple(e for e in np.argsort(before - now, kind="stable")[:3].tolist() if now[e] > before[e]),
    )


def noise_floor_bits(*, experts: int, rows: int) -> float:
    """The expected divergence of two independent samples of `rows` rows: (experts - 1) / (4 rows) nats, in bits.

    The probe routes the same tokens twice, so an unchanged router has a divergence of exactly 0. The floor is the
    typical difference between two random batches; a smaller drift is not evidence of a changed load.
    """
    return (experts - 1) / (4 * rows * np.log(2)) if rows else 0.0


def _probability_bits(before: NDArray[np.floating[Any]], now: NDArray[np.floating[Any]]) -> float:
    p, q = before.astype(np.float64), now.astype(np.float64)
    return jensen_shannon_bits(p / p.sum(), q / q.sum())


def _busiest_kept(before: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    top = max(1, before.size // 8)
    kept = np.intersect1d(np.argsort(-before, kind="stable")[:top], np.argsort(-now, kind="stable")[:top])
    return float(kept.size / top)


def routing_record(
    snapshot: RoutingSnapshot, measures: Sequence[LayerMeasures], drift: Sequence[LayerDrift] | None = None
) -> dict[str, Any]:
    """The `routing` line of metrics.jsonl: the measures of every layer, and at drift steps a `drift` object each."""
    drifts = {d.layer: {k: v for k, v in asdict(d).items() if k != "layer"} for d in drift or ()}
    layers = []
    for measure in measures:
        entry = {name: value for name, value in asdict(measure).items() if name != "load_share"}
        layers.append(entry | ({"drift": drifts[measure.layer]} if measure.layer in drifts else {}))
    return {
        "kind": "routing",
        "step": snapshot.step,
        "tokens": snapshot.tokens,
        "experts": snapshot.experts,
        "layers": layers,
    }


def recorded_drift(record: Mapping[str, Any]) -> list[LayerDrift]:
    """The drift in a `routing` line of metrics.jsonl; empty if none was measured."""
    measured = [(entry["layer"], entry["drift"]) for entry in record["layers"] if "drift" in entry]
    return [LayerDrift(layer=layer, **drift | {"gained": tuple(drift["gained"])}) for layer, drift in measured]


def snapshot_path(run: Path, step: int) -> Path:
    return run / "routing" / f"step-{step:08d}.npz"


def write_snapshot(path: Path, snapshot: RoutingSnapshot) -> None:
    """Write the raw counts as a compressed npz file, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        step=np.int64(snapshot.step),
        layers=np.array(snapshot.layers, dtype=np.int64),
        counts=snapshot.counts,
        tokens=np.int64(snapshot.tokens),
    )
    replace_file(path, buffer.getvalue())


def read_snapshot(path: str | Path) -> RoutingSnapshot:
    """Read a file of `write_snapshot`.

    Raises:
        MonitoringError: no such file, or not a snapshot.
    """
    path = Path(path)
    try:
        contents = read_bytes(path)
        with np.load(io.BytesIO(contents), allow_pickle=False) as stored:
            step, layers, counts, tokens = (stored[name] for name in ("step", "layers", "counts", "tokens"))
    except MissingFileError:
        raise MonitoringError(f"{path}: no such file; is the run folder complete?") from None
    except FileError as error:
        raise MonitoringError(str(error)) from None
    except DAMAGED as error:
        raise MonitoringError(f"{path}: not a routing snapshot ({error}); delete it to go on without it") from None
    are_numbers = all(array.dtype.kind in "iu" for array in (step, layers, counts, tokens))
    if not are_numbers or step.ndim or tokens.ndim or not (counts.ndim == 2 and layers.shape == counts.shape[:1]):
        raise MonitoringError(f"{path}: not a routing snapshot (its arrays do not fit); delete it to go on without it")
    if not 0 < layers.size == np.unique(layers).size or min(layers.min(), counts.min(initial=0), step, tokens) < 0:
        raise MonitoringError(f"{path}: not a routing snapshot (negative counts); delete it to go on without it")
    return RoutingSnapshot(int(step), tuple(layers.tolist()), counts, int(tokens))
