"""How evenly the router spreads rows over experts, and how far it has moved from the frozen base: numbers from counts.

Counts are what a whole global batch sent to each expert since the last logging step: all micro-batches, all ranks,
padding excluded, each row once. They arrive here already summed; nothing in this file communicates.

A well-trained router is uneven on a narrow domain and that is healthy, so the measures of a single snapshot describe
and do not judge; what moved is told by `routing_drift`, on the same tokens through the frozen base.
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

# What numpy, zipfile and zlib raise for an archive whose bytes were changed.
DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, tokenize.TokenError, struct.error, EOFError, KeyError),
    *(ValueError, TypeError, OSError, SyntaxError, RuntimeError, OverflowError, MemoryError, IndexError),
)
STARVED_BELOW = 0.01  # of the mean load
ALIVE_IN_BASE_ROWS = 5  # fewer rows than this can vanish from a probe by chance


@dataclass(frozen=True, eq=False)
class RoutingSnapshot:
    """Rows that every expert of every MoE layer received in one window of training, layers in numeric order."""

    step: int
    layers: tuple[int, ...]  # true layer numbers; dense layers are absent
    counts: NDArray[np.int64]  # (layers, experts)
    tokens: int  # non-padding tokens of the window; each makes top_k rows a layer

    def __post_init__(self) -> None:
        layers, counts = np.asarray(self.layers, dtype=np.int64), np.asarray(self.counts, dtype=np.int64)
        assert counts.ndim == 2, f"counts must be (layers, experts), not {counts.shape}"
        assert 0 < counts.shape[0] == layers.size == np.unique(layers).size, (
            f"{counts.shape} counts for layers {layers}"
        )
        order = np.argsort(layers)  # by number: sorted as text, layer 10 would come before layer 2
        object.__setattr__(self, "layers", tuple(layers[order].tolist()))
        object.__setattr__(self, "counts", counts[order])

    @property
    def experts(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True, eq=False)
class LayerMeasures:
    """The spread of one layer's load. A layer that received no rows has all its shares at 0."""

    layer: int
    rows: int
    load_share: NDArray[np.float64]  # (experts,), sums to 1
    busiest_expert: int
    max_share: float  # of rows; at most 1 / top_k
    max_token_share: float  # of tokens that chose the busiest expert; at most 1
    effective_experts: float  # exp of the entropy of the load share: all experts when even, 1 when one takes all
    max_vio: float  # busiest expert / mean - 1: 0 when even
    cv: float  # standard deviation / mean
    dead: int  # experts without a row
    starved: int  # experts with rows, but under 1 % of the mean


@dataclass(frozen=True)
class LayerDrift:
    """How far one layer's routing of the probe tokens lies from the frozen base's routing of the same tokens."""

    layer: int
    load_bits: float  # Jensen-Shannon divergence of the load shares: 0 equal, 1 disjoint
    noise_bits: float  # divergence expected between two independent samples of this many rows from one router
    kept: float  # fraction of (token, choice) slots whose expert the base chooses for that token too
    probability_bits: float | None  # Jensen-Shannon divergence of the mean router probabilities
    busiest_kept: float  # fraction of the base's busiest eighth of experts that still are the busiest eighth
    effective_ratio: float  # effective experts now / in the base
    newly_dead: int  # experts without a row now to which the base gives 5 rows or more
    gained: tuple[int, ...]  # up to three experts whose load share grew most


def routing_measures(snapshot: RoutingSnapshot) -> list[LayerMeasures]:
    """The measures of every layer of a snapshot, in its order."""
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
    """The fraction of rows that each expert received; zeros when there were no rows."""
    rows = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, rows, out=np.zeros(counts.shape), where=rows > 0)


def effective_experts(share: NDArray[np.float64]) -> float:
    """The number of equally loaded experts that would have this entropy; 0 when there were no rows."""
    return float(np.exp(_entropy_nats(share))) if share.any() else 0.0


def jensen_shannon_bits(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """H((p + q) / 2) - (H(p) + H(q)) / 2 in bits: 0 when equal, 1 when disjoint. Both must sum to 1."""
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
        base_counts: (layers, experts) rows that the frozen base (adapters off) sends to each expert.
        counts: the same of the model in training, on the same tokens.
        kept: (layers,) fraction of (token, choice) slots whose expert the base chooses for that token too.
        base_probabilities: (layers, experts) router probabilities of the base, mean over the probe tokens.
        probabilities: the same of the model in training.
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
    """(experts - 1) / (4 rows) nats, in bits: the divergence of two independent samples of `rows` rows each.

    The probe routes the same tokens twice, so an unmoved router shows exactly 0; the floor is what the difference
    between two random batches would look like, below which a drift says nothing about the load.
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
    """The `routing` line of metrics.jsonl: the measures of every layer, with a `drift` object on a drift step."""
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
    """The drift in a `routing` line read back from metrics.jsonl; empty where none was measured."""
    measured = [(entry["layer"], entry["drift"]) for entry in record["layers"] if "drift" in entry]
    return [LayerDrift(layer=layer, **drift | {"gained": tuple(drift["gained"])}) for layer, drift in measured]


def snapshot_path(run: Path, step: int) -> Path:
    return run / "routing" / f"step-{step:08d}.npz"


def write_snapshot(path: Path, snapshot: RoutingSnapshot) -> None:
    """Write the raw counts as a compressed npz, whole or not at all."""
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
    """The snapshot that `write_snapshot` put at `path`.

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
