"""Fused expert kernels against the definition: a loop over experts between the sort and the weighted sum."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from finetune.kernels.triton.fused_experts import experts_fused, moe_fused
from finetune.model.config import Recompute
from finetune.model.moe import ExpertFactors, LowRank, Routing, exchange_locally, experts_in_a_loop
from tests.configs import tiny_config
from tests.test_model import random_model

# float32 sums of `depth` products in another order; errors grow with its root, and the values are near 1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


class Case(NamedTuple):
    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int
    used: int  # experts that tokens choose from


CASES = {
    "even": Case(63, 4, 2, 32, 16, 4),
    "no-tokens": Case(0, 4, 2, 32, 16, 4),
    "one-token": Case(1, 8, 3, 32, 16, 8),
    "experts-without-rows": Case(130, 9, 2, 32, 16, 3),
    "one-expert": Case(63, 1, 1, 32, 16, 1),
    "sizes-that-no-tile-divides": Case(37, 5, 3, 44, 20, 5),
    "wider-than-a-tile": Case(40, 3, 2, 96, 72, 3),
}


def tensors(case: Case, *, rank: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Routing, list[Tensor]]:
    """x, its routing, and everything that may need a gradient besides: weights, experts, and factors."""
    x = torch.randn(case.tokens, case.hidden, dtype=dtype)
    scores = torch.rand(case.tokens, case.used)
    chosen = scores.argsort(dim=1)[:, : case.top_k] + case.experts - case.used
    weights = torch.rand(case.tokens, case.top_k).softmax(-1).to(dtype)
    counts = torch.bincount(chosen.flatten(), minlength=case.experts)
    none = torch.empty(0)
    gate_up = torch.randn(case.experts, 2 * case.width, case.hidden, dtype=dtype) / case.hidden**0.5
    down = torch.randn(case.experts, case.hidden, case.width, dtype=dtype) / case.width**0.5
    more = [gate_up, down]
    if rank:
        for weight in (gate_up, down):
            a = torch.randn(case.experts, rank, weight.shape[2], dtype=dtype) / weight.shape[2] ** 0.5
            b = torch.randn(case.experts, weight.shape[1], rank, dtype=dtype) / rank**0.5
            more += [a, b]
    return x, Routing(chosen, weights, counts, none, none, None), more


def factors_of(more: list[Tensor]) -> ExpertFactors | None:
    if len(more) == 2:
        return None
    return ExpertFactors(LowRank(more[2], more[3], 0.5), LowRank(more[4], more[5], 0.5))


def definition(x: Tensor, routing: Routing, more: list[Tensor]) -> Tensor:
    rows, counts, restore = exchange_locally(x, routing)()
    return x + restore(experts_in_a_loop(rows, counts, more[0], more[1], factors_of(more)))


def fused(x: Tensor, routing: Routing, more: list[Tensor]) -> Tensor:
    return moe_fused(x, routing, more[0], more[1], factors_of(more), x)


def fused_rows(x: Tensor, routing: Routing, more: list[Tensor]) -> Tensor:
    rows, counts, restore = exchange_locally(x, routing)()
    return x + restore(experts_fused(rows, counts, more[0], more[1], factors_of(more)))


def run(
    function: Callable[[Tensor, Routing, list[Tensor]], Tensor],
    x: Tensor,
    routing: Routing,
    more: list[Tensor],
    trains: Callable[[int], bool],
) -> list[Tensor]:
    """Output, and the gradients of x, of the routing weights and of whatever else trains."""
    x, weights = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
    more = [tensor.clone().requires_grad_(trains(place)) for place, tensor in enumerate(more)]
    y = function(x, routing._replace(weights=weights), more)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    asked = [x, weights, *(tensor for tensor in more if tensor.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, asked, gradient)]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("function", [fused, fused_rows])
@pytest.mark.parametrize("what", ["frozen", "experts", "factors", "both"])
def test_equals_the_loop(case: str, function: Callable[..., Tensor], what: str) -> None:
    sizes = CASES[case]
    rank = 3 if what in ("factors", "both") else 0
    x, routing, more = tensors(sizes, rank=rank)
    trains = {
        "frozen": lambda place: False,
        "experts": lambda place: True,
        "factors": lambda place: place >= 2,
        "both": lambda place: True,
    }[what]
    expected = run(definition, x, routing, more, trains)
    for found, exact in zip(run(function, x, routing, more, trains), expected, strict=True):
        torch.testing.assert_close(found, exact, **TOLERANCE)


def test_recompute_gives_the_same_gradients_and_does_not_compute_the_down_projection_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils.checkpoint import checkpoint

    from finetune.kernels.triton import fused_experts

    x, routing, more = tensors(CASES["even"])
    plain = run(fused, x, routing, more, lambda place: False)
    products = []
    grouped = fused_experts.grouped_product
    monkeypatch.setattr(fused_experts, "grouped_product", lambda *a, **k: products.append(k) or grouped(*a, **k))

    def recomputed(x: Tensor, routing: Routing, more: list[Tensor]) -> Tensor:
        return checkpoint(fused, x, routing, more, use_reentrant=False)

    for found, exact in zip(run(recomputed, x, routing, more, lambda place: False), plain, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0)
    # Once down, forward; once the gradient of x. A third would be the down-projection of the recompute.
    assert len(products) == 2


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("again", [Recompute(True, True), Recompute(False, True)], ids=["layer", "experts"])
def test_a_layer_computed_again_skips_the_down_projection(
    again: Recompute, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.kernels.triton import fused_experts

    model = random_model(tiny_config(num_hidden_layers=1, layer_types=["full_attention"]))
    model.model.layers[0].mlp.whole = moe_fused
    model.model.layers[0].mlp.experts.requires_grad_(False)
    model.recompute = (again,)
    segments = torch.zeros(1, 24, dtype=torch.long)
    segments[0, 24 - padding :] = -1
    products = []
    grouped = fused_experts.grouped_product
    monkeypatch.setattr(fused_experts, "grouped_product", lambda *a, **k: products.append(k) or grouped(*a, **k))
    ids = torch.randint(96, (1, 24))
    model(ids, segments, labels=ids.masked_fill(segments == -1, -100)).loss_sum.backward()
    assert len(products) == 2


def test_frozen_experts_get_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.kernels.triton import fused_experts

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a weight gradient was computed")

    monkeypatch.setattr(fused_experts, "weight_gradient", refuse)
    x, routing, more = tensors(CASES["even"])
    run(fused, x, routing, more, lambda place: False)


@pytest.mark.gpu
def test_bfloat16_stays_near_the_float32_definition() -> None:  # Triton's interpreter has no bfloat16 products
    x, routing, more = tensors(CASES["even"], dtype=torch.bfloat16)
    exact = run(
        definition,
        x.float(),
        routing._replace(weights=routing.weights.float()),
        [tensor.float() for tensor in more],
        lambda place: False,
    )
    x, more = x.cuda(), [tensor.cuda() for tensor in more]
    routing = routing._replace(**{name: getattr(routing, name).cuda() for name in ("experts", "weights", "rows")})
    for found, expected in zip(run(fused, x, routing, more, lambda place: False), exact, strict=True):
        # bfloat16 keeps 8 bits; three roundings (activation, output, combination) of 2^-9 each.
        assert float((found.cpu().float() - expected).norm() / expected.norm()) < 8e-3
