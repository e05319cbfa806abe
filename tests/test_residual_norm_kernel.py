"""The residual addition fused with the norm after it, against the definition."""

import pytest
import torch

from finetune.kernels.triton.residual_norm import residual_norm_fused
from finetune.model.layers import residual_norm
from tests.kernels import assert_as_exact, assert_equal_forms

EPS = 1e-6


def inputs(rows: int, dim: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> list[object]:
    x, delta = (torch.randn(rows, dim).to(dtype).requires_grad_() for _ in range(2))
    return [x, delta, (0.3 * torch.randn(dim)).to(dtype).requires_grad_(trains), EPS]


@pytest.mark.parametrize("trains", [True, False], ids=["weight", "frozen"])
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 1), (63, 20), (130, 33)])
def test_sum_norm_and_gradients(rows: int, dim: int, trains: bool) -> None:
    assert_equal_forms(residual_norm_fused, residual_norm, inputs(rows, dim, trains=trains), rtol=1e-5, atol=1e-5)


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.kernels.triton.residual_norm.PROGRAMS", 3)
    assert_equal_forms(residual_norm_fused, residual_norm, inputs(8, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [0, 1], ids=["sum-alone", "norm-alone"])
def test_one_output_is_read_alone(read: int) -> None:
    given = inputs(5, 12)
    if read == 0:
        given[2] = given[2].detach()  # the weight has no gradient then
    assert_equal_forms(
        lambda *x: residual_norm_fused(*x)[read], lambda *x: residual_norm(*x)[read], given, rtol=1e-5, atol=1e-5
    )


def test_bfloat16() -> None:
    assert_as_exact(residual_norm_fused, residual_norm, inputs(7, 24, torch.bfloat16))


def test_rows_that_are_not_contiguous() -> None:
    x, delta = torch.randn(6, 4, 10).transpose(0, 1).requires_grad_(), torch.randn(4, 6, 20)[..., ::2].requires_grad_()
    assert_equal_forms(residual_norm_fused, residual_norm, [x, delta, torch.randn(10), EPS], rtol=1e-5, atol=1e-5)
