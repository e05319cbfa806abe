"""The router in one pass, against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.kernels.triton.router import route_fused
from finetune.model.moe import Router, Routing
from tests.kernels import assert_as_exact, assert_equal_forms, outputs_and_gradients


def definition(x: Tensor, weight: Tensor, top_k: int, normalise: bool) -> Routing:
    router = Router(weight.shape[1], len(weight), top_k, normalise)
    return torch.func.functional_call(router, {"weight": weight}, (x,))


def inputs(tokens: int, hidden: int, experts: int, top_k: int, *, normalise: bool) -> list[Any]:
    weight = torch.randn(experts, hidden) / hidden**0.5
    return [torch.randn(tokens, hidden).requires_grad_(), weight.requires_grad_(), top_k, normalise]


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as-they-are"])
@pytest.mark.parametrize(
    "sizes", [(0, 4, 8, 2), (1, 3, 1, 1), (63, 8, 5, 5), (130, 6, 33, 3), (9, 16, 64, 10)], ids=str
)
def test_routing_and_gradients(sizes: tuple[int, ...], normalise: bool) -> None:
    assert_equal_forms(route_fused, definition, inputs(*sizes, normalise=normalise), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("read", ["weights", "logits"])
def test_one_output_is_read_alone(read: str, normalise: bool) -> None:
    forms = (lambda *x, form=form: getattr(form(*x), read) for form in (route_fused, definition))
    assert_equal_forms(*forms, inputs(11, 8, 12, 4, normalise=normalise), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", [0, 1], ids=["input", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    given = inputs(11, 8, 12, 4, normalise=True)
    given[frozen] = given[frozen].detach()
    assert_equal_forms(route_fused, definition, given, rtol=1e-5, atol=2e-5)


def test_of_equal_probabilities_the_lower_expert_wins() -> None:
    weight = torch.randn(3, 4).repeat_interleave(4, dim=0)  # experts in fours alike
    x = torch.randn(17, 4)
    found = route_fused(x, weight, 6, True)
    assert torch.equal(found.experts[:, :4] % 4, torch.arange(4).expand(17, -1))
    assert torch.equal(found.experts[:, 4:] % 4, torch.arange(2).expand(17, -1))
    assert all(len(set(row)) == 6 for row in found.experts.tolist())
    torch.testing.assert_close(found.weights, definition(x, weight, 6, True).weights)
    same = route_fused(torch.zeros(5, 4), weight, 3, True)  # every expert equally probable
    assert torch.equal(same.experts, torch.arange(3).expand(5, -1))
    assert same.rows.tolist() == [5] * 3 + [0] * 9


def test_logits_so_far_apart_that_probabilities_vanish() -> None:
    x, weight = torch.eye(4)[:3].repeat(3, 1), 200.0 * torch.randn(9, 4)
    found = outputs_and_gradients(route_fused, [x.requires_grad_(), weight.requires_grad_(), 2, True])
    expected = outputs_and_gradients(definition, [x, weight, 2, True])
    clear = expected[1][:, 1] > 0  # a second choice of probability zero is a tie
    assert torch.equal(found[0][clear], expected[0][clear])
    for a, b in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_counts_add_up_and_have_the_definition_s_types() -> None:
    found, expected = (form(*inputs(70, 8, 12, 4, normalise=True)) for form in (route_fused, definition))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert int(found.rows.sum()) == 70 * 4
    assert float(found.probability_sum.sum()) == pytest.approx(70)


def test_bfloat16() -> None:
    x, weight, *rest = inputs(33, 16, 12, 4, normalise=True)
    given = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    assert torch.equal(route_fused(*given, *rest).experts, definition(*given, *rest).experts)
    forms = (lambda *x, form=form: form(*x)[1::4] for form in (route_fused, definition))  # shares and logits
    assert_as_exact(*forms, [*given, *rest])
