"""The gated activation and the gated sum of experts, against their definitions."""

from typing import Any

import pytest
import torch

from finetune.kernels.triton.swiglu import add_gated_fused, swiglu_fused
from finetune.model.layers import add_gated, swiglu
from tests.kernels import assert_as_exact, assert_equal_forms

SIZES = [(0, 8), (1, 1), (63, 20), (130, 33)]


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_swiglu(rows: int, width: int) -> None:
    gate, up = (3 * torch.randn(rows, width)).requires_grad_(), torch.randn(rows, width).requires_grad_()
    assert_equal_forms(swiglu_fused, swiglu, [gate, up], rtol=1e-5, atol=1e-6)


def test_swiglu_of_two_halves_of_a_row() -> None:
    both = torch.randn(2, 9, 14).requires_grad_()
    assert_equal_forms(
        lambda x: swiglu_fused(*x.chunk(2, dim=-1)), lambda x: swiglu(*x.chunk(2, dim=-1)), [both], rtol=1e-5, atol=1e-6
    )


def gated(rows: int, hidden: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> list[Any]:
    tensors = [torch.randn(rows, hidden).to(dtype).requires_grad_() for _ in range(3)]
    return [*tensors, torch.randn(1, hidden).to(dtype).requires_grad_(trains)]


@pytest.mark.parametrize("trains", [True, False], ids=["weight", "frozen"])
@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_add_gated(rows: int, hidden: int, trains: bool) -> None:
    assert_equal_forms(add_gated_fused, add_gated, gated(rows, hidden, trains=trains), rtol=1e-5, atol=1e-5)


def test_add_gated_without_routed_experts() -> None:
    _, *others = gated(9, 12)
    assert_equal_forms(add_gated_fused, add_gated, [None, *others], rtol=1e-5, atol=1e-5)


def test_add_gated_with_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.kernels.triton.swiglu.PROGRAMS", 3)
    assert_equal_forms(add_gated_fused, add_gated, gated(8, 5), rtol=1e-5, atol=1e-5)


def test_add_gated_where_the_input_is_frozen() -> None:
    routed, shared, x, weight = gated(6, 10)
    for given in ([routed, shared, x.detach(), weight.detach()], [routed.detach(), shared, x.detach(), weight]):
        assert_equal_forms(add_gated_fused, add_gated, given, rtol=1e-5, atol=1e-5)


def test_bfloat16() -> None:
    assert_as_exact(swiglu_fused, swiglu, [torch.randn(5, 24).bfloat16().requires_grad_() for _ in range(2)])
    assert_as_exact(add_gated_fused, add_gated, gated(5, 24, torch.bfloat16))
