"""Trials of fast forms at start: each is compared with its definition on this device, at the model's widths.

They find errors of a compiler on one type of GPU, or of one version of a library, before the first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.model.attention import Packing
from finetune.model.config import ModelConfig
from finetune.model.deltanet import Heads, l2_normalize
from finetune.model.layers import positions_in_segments, rotary_table
from finetune.model.moe import ExpertCompute, ExpertFactors, LowRank, Routing, exchange_locally, experts_in_a_loop

# Largest accepted relative error (norm of the difference over norm of the definition's result). bfloat16 keeps 8 bits,
# so one rounding is up to 2^-9, and the longest chain has about five; in float32 the order of summation differs.
AGREES = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-10}
ROWS = 130  # more than one tile, and not a multiple of one


class DisagreementError(ValueError):
    """The result of a fast form differs from that of its definition."""


@dataclass(frozen=True)
class Place:
    """Conditions that kernels must support: the model's widths, the device, the dtype of the weights."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"

    def random(self, *shape: int) -> Tensor:
        """Standard normal leaf tensor that requires a gradient; the values depend on the shape alone."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return drawn.to(self.device, self.dtype).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """Like `random`, with variance 1 / shape[-1], so that a product keeps the scale of its input."""
        return (self.random(*shape).detach() * shape[-1] ** -0.5).requires_grad_()


def compare(fast: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Tensor], place: Place) -> float:
    """Run both on the same inputs; return the largest relative error of the outputs and gradients.

    Raises:
        DisagreementError: a shape differs, or an error is larger than `AGREES` of the dtype, or NaN.
    """
    worst = 0.0
    for name, found, expected in _outputs_and_gradients(fast, definition, inputs):
        if found.shape != expected.shape:
            raise DisagreementError(f"{name} has shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        size = float(expected.double().norm()) or 1.0
        error = float((found.double() - expected.double()).norm()) / size
        if not error <= AGREES[place.dtype]:  # also true of NaN
            raise DisagreementError(f"{name} is {error:.1e} away from its definition")
        worst = max(worst, error)
    return worst


def _outputs_and_gradients(
    fast: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Tensor]
) -> list[tuple[str, Tensor, Tensor]]:
    sides = []
    for function in (fast, definition):
        result = function(*inputs)
        outputs = [result] if isinstance(result, Tensor) else [y for y in result if isinstance(y, Tensor)]
        smooth = [y for y in outputs if y.requires_grad]
        given = [
            torch.randn(y.shape, generator=torch.Generator().manual_seed(number)).to(y)
            for number, y in enumerate(smooth)
        ]
        wanted = [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(smooth, wanted, given, allow_unused=True, materialize_grads=True)
        named = [(f"output {number}", y.detach()) for number, y in enumerate(outputs)]
        sides.append(named + [(f"gradient {number}", gradient) for number, gradient in enumerate(gradients)])
    return [(name, found, expected) for (name, found), (_, expected) in zip(*sides, strict=True)]


def experts(compute: ExpertCompute, place: Place) -> float:
    """Relative error for three experts, one of them without rows, with adapters of rank 1."""
    hidden, width = place.config.hidden_size, place.config.moe_intermediate_size
    counts = torch.tensor([ROWS - 1, 0, 1], device=place.device)
    a1, b1 = place.weight(3, 1, hidden), place.random(3, 2 * width, 1)
    a2, b2 = place.weight(3, 1, width), place.random(3, hidden, 1)

    def using(function: ExpertCompute) -> Callable[..., Tensor]:
        def run(rows: Tensor, gate_up: Tensor, down: Tensor, *factors: Tensor) -> Tensor:
            low_rank = ExpertFactors(LowRank(factors[0], factors[1], 0.5), LowRank(factors[2], factors[3], 0.5))
            return function(rows, counts, gate_up, down, low_rank)

        return run

    inputs = [place.random(ROWS, hidden), *_stacks(place), a1, b1, a2, b2]
    return compare(using(compute), using(experts_in_a_loop), inputs, place)


def whole(compute: Callable[..., Tensor], place: Place) -> float:
    """Relative error of sort, three experts and weighted sum; each token chooses two."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(ROWS, 3, generator=generator).argsort(1)[:, :2].to(place.device)
    none = torch.empty(0, device=place.device)

    def routing(weights: Tensor) -> Routing:
        return Routing(chosen, weights, torch.bincount(chosen.flatten(), minlength=3), none, none, None)

    def fast(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return compute(x, routing(weights), gate_up, down, None, x)

    def definition(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows, counts, restore = exchange_locally(x, routing(weights))()
        return x + restore(experts_in_a_loop(rows, counts, gate_up, down))

    inputs = [place.random(ROWS, place.config.hidden_size), place.random(ROWS, 2), *_stacks(place)]
    return compare(fast, definition, inputs, place)


def _stacks(place: Place) -> list[Tensor]:
    hidden, width = place.config.hidden_size, place.config.moe_intermediate_size
    return [place.weight(3, 2 * width, hidden), place.weight(3, hidden, width)]


def layers(fast: Any, plain: Any, place: Place) -> float:
    """Largest relative error of norms, router, shared expert and loss (two `choose.Layers`)."""
    config = place.config
    hidden, eps = config.hidden_size, config.rms_norm_eps
    x, delta, weight = place.random(ROWS, hidden), place.random(ROWS, hidden), place.random(hidden)
    labels = torch.arange(ROWS, device=place.device).view(1, -1)
    labels = torch.where(labels % 3 == 0, -100, labels)
    top_k, normalise = config.num_experts_per_tok, config.norm_topk_prob
    router = place.random(config.num_experts, hidden)  # large enough that rounding does not change the chosen experts
    head = place.weight(1000, hidden)  # a vocabulary that is not a multiple of a tile
    return max(
        compare(*_both(fast.norm, plain.norm, eps), [x, weight], place),
        compare(*_both(fast.add_and_norm, plain.add_and_norm, eps), [x, delta, weight], place),
        compare(*_both(fast.route, plain.route, top_k, normalise), [x, router], place),
        compare(fast.activate, plain.activate, [x, delta], place),
        compare(
            lambda *inputs: fast.add_gated(None, *inputs), lambda *inputs: plain.add_gated(None, *inputs),
            [delta, x, place.weight(1, hidden)], place,
        ),
        compare(*_both(fast.loss, plain.loss, labels), [x.detach()[None].requires_grad_(), head], place),
    )  # fmt: skip


def mixers(fast: Any, plain: Any, place: Place) -> float:
    """Largest relative error of DeltaNet and attention (two `choose.Mixers`), on two documents."""
    segments = torch.arange(ROWS, device=place.device).view(1, -1) // (ROWS - 50)
    return max(_deltanet(fast, plain, place, segments), _attention(fast, plain, place, segments))


def _deltanet(fast: Any, plain: Any, place: Place, segments: Tensor) -> float:
    config = place.config
    heads = Heads(
        config.linear_num_key_heads, config.linear_num_value_heads,
        config.linear_key_head_dim, config.linear_value_head_dim,
    )  # fmt: skip
    channels = 2 * config.key_dim + config.value_dim
    projections = [place.random(1, ROWS, channels + config.value_dim), place.random(1, ROWS, 2 * heads.values)]
    weights = [place.random(channels, config.linear_conv_kernel_dim), *(place.random(heads.values) for _ in range(2))]

    def rule(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, write: Tensor) -> Tensor:
            return form(
                query=l2_normalize(query), key=l2_normalize(key), value=value, log_decay=-F.softplus(decay.float()),
                write=write.float().sigmoid(), segment_ids=segments,
            ).to(value.dtype)  # fmt: skip

        return run

    by_key, by_value = (1, ROWS, heads.keys, heads.key_dim), (1, ROWS, heads.values, heads.value_dim)
    read = [*(place.random(*shape) for shape in (by_key, by_key, by_value)), *(place.random(*by_value[:3]),) * 2]
    value, gate = place.random(*by_value), place.random(*by_value)
    gate = gate.detach().view(1, ROWS, heads.keys, -1).requires_grad_()
    norm = [value, gate, place.random(heads.value_dim)]
    return max(
        compare(*_both(fast.prepare_delta, plain.prepare_delta, segments, heads), [*projections, *weights], place),
        compare(rule(fast.rule), rule(plain.rule), read, place),
        compare(*_both(fast.gated_norm, plain.gated_norm, config.rms_norm_eps), norm, place),
    )


def _attention(fast: Any, plain: Any, place: Place, segments: Tensor) -> float:
    config = place.config
    dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    positions = positions_in_segments(segments)
    cos, sin = rotary_table(positions, config.rotary_dim, config.rope_theta, place.dtype)
    norms = [place.random(dim), place.random(dim)]

    def prepare(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q_gate, key, *weights: form(q_gate, key, cos, sin, *weights, config.rms_norm_eps)

    packing = Packing(segments, documents=2, longest=ROWS - 50)
    projections = [place.random(1, ROWS, 2 * heads * dim), place.random(1, ROWS, kv_heads * dim)]
    read = [place.random(1, ROWS, number, dim) for number in (heads, kv_heads, kv_heads)]
    output = [place.random(1, ROWS, heads, dim), place.random(1, ROWS, heads, dim)]
    return max(
        compare(prepare(fast.prepare_attention), prepare(plain.prepare_attention), [*projections, *norms], place),
        compare(
            lambda *inputs: fast.attend_packed(*inputs, fast.isolate(packing)),
            lambda *inputs: plain.attend_packed(*inputs, plain.isolate(packing)), read, place,
        ),
        compare(fast.gate_output, plain.gate_output, output, place),
    )  # fmt: skip


def _both(
    fast: Callable[..., Any], plain: Callable[..., Any], *rest: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both forms with `rest` bound as their last arguments."""
    return (lambda *inputs: fast(*inputs, *rest)), (lambda *inputs: plain(*inputs, *rest))
