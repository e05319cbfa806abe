"""Head and cross-entropy without the logits of all tokens, against the definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels.triton import loss
from finetune.kernels.triton.loss import token_loss_sum_fused
from finetune.model.head import IGNORED, token_loss_sum
from tests.kernels import assert_as_exact, assert_equal_forms, outputs_and_gradients


def inputs(batch: int, time: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    x, weight = torch.randn(batch, time, hidden).to(dtype), (torch.randn(vocabulary, hidden)).to(dtype)
    labels = torch.randint(vocabulary, (batch, time)).masked_fill(torch.rand(batch, time) < 0.3, IGNORED)
    return [x.requires_grad_(), weight.requires_grad_(), labels]


@pytest.mark.parametrize(
    "sizes", [(1, 0, 4, 5), (1, 1, 3, 1), (1, 63, 8, 50), (2, 65, 6, 129), (1, 9, 4, 300)], ids=str
)
@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
def test_loss_count_and_gradients(sizes: tuple[int, ...], trains: str) -> None:
    x, weight, labels = inputs(*sizes)
    given = [x if trains != "weight" else x.detach(), weight if trains != "hidden" else weight.detach(), labels]
    assert_equal_forms(token_loss_sum_fused, token_loss_sum, given, rtol=1e-5, atol=1e-4)


def test_a_vocabulary_of_several_blocks_and_logits_far_apart() -> None:
    x, weight, labels = inputs(1, 4, 3, 8192 + 77)
    labels = torch.tensor([[0, 8191, 8192, 8268]])  # the edges of the blocks
    given = [(30 * x.detach()).requires_grad_(), weight, labels]
    assert_equal_forms(token_loss_sum_fused, token_loss_sum, given, rtol=1e-4, atol=1e-3)


def test_a_chunk_is_smaller_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 3 * 50 * 4)  # three rows
    assert_equal_forms(token_loss_sum_fused, token_loss_sum, inputs(2, 10, 8, 50), rtol=1e-5, atol=1e-4)


def test_nothing_is_supervised() -> None:
    x, weight, labels = inputs(2, 5, 4, 7)
    found = outputs_and_gradients(token_loss_sum_fused, [x, weight, torch.full_like(labels, IGNORED)])
    assert found[0] == 0
    assert found[1] == 0
    assert not any(gradient.any() for gradient in found[2:])


def test_without_gradients() -> None:
    x, weight, labels = inputs(1, 9, 4, 11)
    with torch.no_grad():
        found, expected = (form(x, weight, labels) for form in (token_loss_sum_fused, token_loss_sum))
    torch.testing.assert_close(found, expected)


def test_a_scaled_loss_in_bfloat16_has_no_rounded_scale() -> None:
    """1/3 rounded to bfloat16 would make every gradient too large by the same 0.2%."""
    x, weight, labels = inputs(1, 65, 8, 33, torch.bfloat16)

    def ratio(scale: float) -> Tensor:
        total, _ = token_loss_sum_fused(x, weight, labels)
        return torch.autograd.grad(total * scale, weight)[0].double().norm()

    assert float(ratio(1 / 3) / ratio(1.0)) == pytest.approx(1 / 3, rel=5e-4)


def test_bfloat16() -> None:
    forms = (lambda *x, form=form: form(*x)[0] for form in (token_loss_sum_fused, token_loss_sum))
    assert_as_exact(*forms, inputs(1, 33, 8, 50, torch.bfloat16))


def test_against_one_cross_entropy_over_all_logits() -> None:
    x, weight, labels = inputs(2, 20, 8, 31)

    def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)

    assert_equal_forms(lambda *x: token_loss_sum_fused(*x)[0], whole, [x, weight, labels], rtol=1e-5, atol=1e-4)
