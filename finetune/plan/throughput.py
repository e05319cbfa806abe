"""Estimates the throughput of a run from measured runs of the real command, `benchmarks/results/real_job.json`.

The time of a token on one card is the sum of the times of its operations in the head, its operations in the layers and
the exchange of its rows. Each has the rate that the measured runs reached. Imports no torch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from finetune.model.config import ModelConfig
from finetune.plan.exchange import GBIT, NVLINK_GBIT, UNKNOWN, Exchange, exchange
from finetune.recipe.paths import CHECKOUT
from finetune.recipe.recipe import Recipe

RESULTS = CHECKOUT / "benchmarks" / "results" / "real_job.json"
SOURCE = RESULTS.relative_to(CHECKOUT).as_posix()
REFERENCE = CHECKOUT / "recipes" / "reference" / "qwen3-coder-next.json"
DENSE_PEAK = 798e12  # bfloat16 operations per second of an H100 or H200 (SXM)
# Relative error of the estimate: for configurations that were measured, and for extrapolation.
MEASURED_MARGIN, EXTRAPOLATED_MARGIN = 0.10, 0.25
# Sizes that determine a card's speed, equal to the measured model's; the number of layers may differ.
WIDTHS = (
    *("hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("head_dim", "num_attention_heads", "linear_num_value_heads", "linear_value_head_dim", "vocab_size"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Inputs of the estimate. Operations are those of one token, forward and backward."""

    config: ModelConfig
    recipe: Recipe
    device: str
    cards: int
    layers_computed_again: bool
    operations: float
    recomputed: float
    accumulation: int
    exchange: Exchange | None


@dataclass(frozen=True)
class Estimate:
    """Tokens per second of all cards together, lower and upper bound, and a sentence that names the source."""

    slowest: float
    fastest: float
    source: str


def estimate(job: Job) -> Estimate | str:
    """Estimate the tokens per second of a run, or return the reason why there is no estimate."""
    form = form_of(job.recipe)
    reason = _not_measured(job)
    if reason:
        return reason
    rows = [row for row in measured_rows() if row.get("kernels", "fused") == form]
    fit = _fit(_like(rows, job.device))
    if fit is None:
        return f"the {form} kernels were not measured"
    seconds = fit.seconds(job.operations + job.recomputed, _head_operations(job.config))
    if job.exchange is not None:
        sent = _exchange_seconds(job.exchange, fit)
        if sent is None:
            return "what the links between the ranks carry is not known; --network-gbit or --node-gbit says it"
        seconds += sent / (job.accumulation * job.recipe.train.micro_batch_tokens)
    unlike = _unlike(job, rows)
    margin = EXTRAPOLATED_MARGIN if unlike else MEASURED_MARGIN
    rate = job.cards / seconds
    source = f"from runs of the real command on {_described(fit.rows)} ({SOURCE})"
    if unlike:
        source = f"extrapolated to {', '.join(unlike)} {source}"
    return Estimate(rate * (1 - margin), rate * (1 + margin), f"{source}, within {margin:.0%}")


def form_of(recipe: Recipe) -> str:
    """Which kernels a GPU uses: `fused`, `plain`, or `mixed` if the recipe sets some of each."""
    kernels = (recipe.kernels.experts, recipe.kernels.layers, recipe.kernels.mixers)
    fused = [kind in ("auto", "fused") for kind in kernels]
    return "fused" if all(fused) else "mixed" if any(fused) else "plain"


@cache
def measured_rows() -> tuple[dict[str, Any], ...]:
    """Measured runs on GPUs without recomputation; empty if there is no file."""
    if not RESULTS.is_file():
        return ()
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return tuple(row for row in rows if row["mfu"] and row["recompute"] == "nothing")


@dataclass(frozen=True)
class _Fit:
    """Seconds per operation in the head and in the layers, and bytes per second of the exchange if measured."""

    head: float
    layers: float
    exchange_rate: float | None
    rows: Sequence[dict[str, Any]]

    def seconds(self, operations: float, head: float) -> float:
        """Seconds of one token on one card, without the exchange."""
        return self.head * head + self.layers * (operations - head)


def _fit(rows: Sequence[dict[str, Any]]) -> _Fit | None:
    """Fit the rates to measured runs; None without a run on which every rank holds all experts.

    Runs without an exchange determine head and layers, by least squares of relative errors. If they all have the same
    number of layers, head and layers get the same rate. The remaining time of runs with an exchange gives its rate.
    """
    alone = [row for row in rows if row["expert"] == 1]
    if not alone:
        return None
    head = _head_operations(_reference())
    points = [(head * rate, (_operations(row) - head) * rate) for row in alone if (rate := _rate(row))]
    if len({row["layers"] for row in alone}) > 1:
        first, second = _solve(points)
    else:
        first = second = 1 / median(a + b for a, b in points)
    fit = _Fit(first, second, None, rows)
    rates = [_bytes(row) / (1 / _rate(row) - fit.seconds(_operations(row), head)) for row in rows if row["expert"] > 1]
    return _Fit(first, second, median(rates) if rates else None, rows)


def _solve(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares solution x, y of a x + b y = 1 over all points (a, b)."""
    aa = ab = bb = a1 = b1 = 0.0
    for a, b in points:
        aa, ab, bb, a1, b1 = aa + a * a, ab + a * b, bb + b * b, a1 + a, b1 + b
    determinant = aa * bb - ab * ab
    return (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant


def _rate(row: dict[str, Any]) -> float:
    """Tokens per second of one card."""
    return float(row["tokens_per_second"]) / int(row["cards"])


def _operations(row: dict[str, Any]) -> float:
    return float(row["mfu"]) * DENSE_PEAK / _rate(row)


def _bytes(row: dict[str, Any]) -> float:
    """Bytes that a card sends to others for one token, over all layers."""
    config, expert = _reference(), int(row["expert"])
    sent = exchange(
        layers=int(row["layers"]),
        micro_batches=1,
        tokens=int(row["micro_batch_tokens"]),
        hidden=config.hidden_size,
        weight_bytes=2,
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_size=expert,
        ranks=int(row["cards"]),
        ranks_per_node=int(row["cards"]),
        forward_passes=1,
        links=UNKNOWN,
    )
    return sent.node_bytes * sent.times / int(row["micro_batch_tokens"])


def _exchange_seconds(made: Exchange, fit: _Fit) -> float | None:
    """Seconds of one step's exchange, if every link reaches the measured share of its bandwidth; None if unknown."""
    node_gbit = made.links.node_gbit or NVLINK_GBIT
    if fit.exchange_rate is None or (made.network_bytes and not made.links.network_gbit):
        return None
    share = fit.exchange_rate / (NVLINK_GBIT * GBIT)
    seconds = made.node_bytes / (share * node_gbit * GBIT)
    if made.network_bytes and made.links.network_gbit:
        seconds = max(seconds, made.network_bytes * made.ranks_per_node / (share * made.links.network_gbit * GBIT))
    return made.times * seconds


def _not_measured(job: Job) -> str:
    """The reason why there is no estimate for this job, or an empty string."""
    recipe, smallest = job.recipe, min((row["micro_batch_tokens"] for row in measured_rows()), default=0) // 2
    if not measured_rows():
        return f"{SOURCE} holds no run"
    for is_unlike, words in (
        (not _is_known(job.device), f"{job.device} was not measured"),
        (recipe.lora is None, "full-parameter training was not measured"),
        (bool(recipe.lora and "experts" in recipe.lora.targets), "adapters on routed experts were not measured"),
        (recipe.model.dtype == "float32", "float32 was not measured on a GPU"),
        (recipe.parallel.offload != "none", "an optimizer state outside the GPU was not measured"),
        (not _has_widths(job.config), "a model of these widths was not measured"),
        (form_of(recipe) == "mixed", "fused and plain kernels together were not measured"),
        (
            recipe.train.micro_batch_tokens < smallest,
            f"micro-batches under {smallest:,} tokens were not measured, and wait for the host",
        ),
    ):
        if is_unlike:
            return words
    return ""


def _is_known(device: str) -> bool:
    """Whether the card has the measured peak. A card given only by its memory is assumed to have it."""
    is_sxm = any(name in device for name in ("H100", "H200")) and not any(name in device for name in ("PCIe", "NVL"))
    return is_sxm or device.startswith("GPU with")


def _has_widths(config: ModelConfig) -> bool:
    return all(getattr(config, name) == getattr(_reference(), name) for name in WIDTHS)


def _like(rows: Sequence[dict[str, Any]], device: str) -> Sequence[dict[str, Any]]:
    """Rows of the same device if they have different numbers of layers, which the fit needs; else all rows."""
    same = [row for row in rows if row["device"] == device]
    return same if len({row["layers"] for row in same if row["expert"] == 1}) > 1 else rows


def _unlike(job: Job, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Properties of the job that are outside the measured range."""
    train, layers = job.recipe.train, [row["layers"] for row in rows]
    tokens = [row["micro_batch_tokens"] for row in rows]
    on_device = [row for row in rows if row["device"] == job.device]
    layout = (job.cards, job.recipe.parallel.expert)
    count = job.config.num_hidden_layers
    named = (
        (not on_device, job.device),
        (
            layout not in [(row["cards"], row["expert"]) for row in rows],
            f"{_cards(job.cards)} with expert parallel {layout[1]}",
        ),
        (not min(layers) <= count <= max(layers), f"{count} layers"),
        (job.layers_computed_again, "layers that are computed again"),
        (
            train.sequence_tokens not in [row["sequence_tokens"] for row in rows],
            f"sequences of {train.sequence_tokens:,} tokens",
        ),
        (
            not min(tokens) <= train.micro_batch_tokens <= max(tokens),
            f"micro-batches of {train.micro_batch_tokens:,} tokens",
        ),
    )
    return [words for is_unlike, words in named if is_unlike]


def _described(rows: Sequence[dict[str, Any]]) -> str:
    devices = sorted({str(row["device"]) for row in rows})
    layouts = sorted({(row["cards"], row["expert"]) for row in rows})
    layers = sorted({row["layers"] for row in rows})
    where = ", ".join(f"{_cards(cards)} with expert parallel {expert}" for cards, expert in layouts)
    return f"{' and '.join(devices)}: {where}; {layers[0]} to {layers[-1]} layers"


def _cards(count: int) -> str:
    return f"{count} card{'s' if count > 1 else ''}"


def _head_operations(config: ModelConfig) -> float:
    """Operations of one token in the frozen head, forward and backward."""
    return 4.0 * config.vocab_size * config.hidden_size


@cache
def _reference() -> ModelConfig:
    return ModelConfig.from_dict(json.loads(REFERENCE.read_text(encoding="utf-8")))
