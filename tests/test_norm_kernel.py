"""The root-mean-square norm in one pass, against the definition."""

from typing import Any

import pytest
import torch

from finetune.kernels.triton.norm import rms_norm_fused
from finetune.model.layers import rms_norm
from tests.kernels import assert_as_exact, assert_equal_forms

EPS = 1e-6


def inputs(*shape: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> list[Any]:
    weight = (0.3 * torch.randn(shape[-1])).to(dtype).requires_grad_(trains)
    return [torch.randn(shape).to(dtype).requires_grad_(), weight, EPS]


@pytest.mark.parametrize("trains", [True, False], ids=["weight", "frozen"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (63, 20), (130, 33), (2, 3, 4, 16)], ids=str)
def test_output_and_gradients(shape: tuple[int, ...], trains: bool) -> None:
    assert_equal_forms(rms_norm_fused, rms_norm, inputs(*shape, trains=trains), rtol=1e-5, atol=1e-5)


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.kernels.triton.norm.PROGRAMS", 3)
    assert_equal_forms(rms_norm_fused, rms_norm, inputs(8, 5), rtol=1e-5, atol=1e-5)


def test_one_half_of_every_head_and_a_transposed_input() -> None:
    x, weight, _ = inputs(2, 7, 3, 20)
    half = weight.detach()[:10].requires_grad_()
    for cut, w in ((lambda x: x.chunk(2, dim=-1)[0], half), (lambda x: x.transpose(1, 2), weight)):
        forms = (lambda x, w, form=form, cut=cut: form(cut(x), w, EPS) for form in (rms_norm_fused, rms_norm))
        assert_equal_forms(*forms, [x, w], rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_and_a_large_one() -> None:
    x, weight, _ = inputs(3, 12)
    x = (x.detach() * torch.tensor([[0.0], [1.0], [1e4]])).requires_grad_()
    assert_equal_forms(rms_norm_fused, rms_norm, [x, weight, EPS], rtol=1e-5, atol=1e-4)


def test_an_expanded_gradient() -> None:
    given = inputs(5, 6)
    forms = (lambda *x, form=form: form(*x).sum() for form in (rms_norm_fused, rms_norm))
    assert_equal_forms(*forms, given, rtol=1e-5, atol=1e-5)


def test_bfloat16() -> None:
    assert_as_exact(rms_norm_fused, rms_norm, inputs(7, 24, dtype=torch.bfloat16))
