"""Trials of fast forms at start: each is run beside its definition on this device, at the model's own widths.

What a compiler gets wrong on one kind of card, or a library in one version, is found here before a step is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.model.config import ModelConfig
from finetune.model.moe import ExpertCompute, ExpertFactors, LowRank, Routing, exchange_locally, experts_in_a_loop

# Largest relative error (norm of the difference over norm) at which a fast form still is its definition. bfloat16 keeps
# 8 bits, so one rounding is 2^-9, and the longest chain of roundings here is about five; float32 sums in another order.
AGREES = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-10}
ROWS = 130  # more than one tile, and no multiple of one


class DisagreementError(ValueError):
    """A fast form gives something else than its definition."""


@dataclass(frozen=True)
class Place:
    """Where kernels have to run: the model's widths, the device, the dtype of the weights."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"

    def random(self, *shape: int) -> Tensor:
        """Normal numbers, the same in every call sequence and on every rank, that a gradient is wanted of."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return drawn.to(self.device, self.dtype).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """Normal numbers that keep the size of what they multiply."""
        return (self.random(*shape).detach() * shape[-1] ** -0.5).requires_grad_()


def compare(fast: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Tensor], place: Place) -> float:
    """Run both on the same inputs; the largest relative error of outputs and of gradients.

    Raises:
        DisagreementError: one of them is further from the definition than rounding explains.
    """
    worst = 0.0
    for name, found, expected in _outputs_and_gradients(fast, definition, inputs):
        if found.shape != expected.shape:
            raise DisagreementError(f"{name} has shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        size = float(expected.double().norm()) or 1.0
        error = float((found.double() - expected.double()).norm()) / size
        if not error <= AGREES[place.dtype]:  # NaN is no agreement
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
    """Three experts, one of them without rows, with adapters of rank 1."""
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
    """Sort, three experts and weighted sum; each token chooses two."""
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


def norm(compute: Callable[..., Tensor], definition: Callable[..., Tensor], place: Place) -> float:
    """Root-mean-square norm of hidden states."""
    hidden, eps = place.config.hidden_size, place.config.rms_norm_eps
    inputs = [place.random(ROWS, hidden), place.random(hidden)]
    return compare(lambda x, w: compute(x, w, eps), lambda x, w: definition(x, w, eps), inputs, place)


def route(compute: Callable[..., Routing], definition: Callable[..., Routing], place: Place) -> float:
    """The router at the model's own number of experts; logits so far apart that no rounding changes the choice."""
    config = place.config
    top_k, normalise = config.num_experts_per_tok, config.norm_topk_prob

    def using(function: Callable[..., Routing]) -> Callable[..., Routing]:
        return lambda x, weight: function(x, weight, top_k, normalise)

    inputs = [place.random(ROWS, config.hidden_size), place.random(config.num_experts, config.hidden_size)]
    return compare(using(compute), using(definition), inputs, place)


def loss(compute: Callable[..., Any], definition: Callable[..., Any], place: Place) -> float:
    """Cross entropy over a vocabulary that no tile divides, some tokens not supervised."""
    labels = torch.arange(ROWS, device=place.device).view(1, -1)
    labels = torch.where(labels % 3 == 0, -100, labels)

    def using(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, weight: function(x, weight, labels)

    hidden = place.config.hidden_size
    return compare(
        using(compute), using(definition), [place.random(1, ROWS, hidden), place.weight(1000, hidden)], place
    )
