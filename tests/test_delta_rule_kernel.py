"""The Triton kernels of the delta rule against the recurrence that defines it; on a CPU in Triton's interpreter."""

from typing import Any

import pytest
import torch

from finetune.kernels.triton.delta_rule import gated_delta_rule
from finetune.model.delta_rule import recurrent_gated_delta_rule
from finetune.model.deltanet import l2_normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In float32 what is compared are two orders of the same sums of some hundred terms.
FLOAT32 = 1e-5
# Operands are rounded to 8 bits; the errors of a product's terms are independent.
BFLOAT16 = 6e-3


def inputs(
    time: int, *, batch: int = 1, key_heads: int = 1, group: int = 2, key: int = 16, value: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    heads = key_heads * group
    tensors = {
        "query": l2_normalize(torch.randn(batch, time, key_heads, key)).to(dtype),
        "key": l2_normalize(torch.randn(batch, time, key_heads, key)).to(dtype),
        "value": torch.randn(batch, time, heads, value).to(dtype),
        # From 0 to -5 a step, many of them weak.
        "log_decay": -5 * torch.rand(batch, time, heads) ** 3,
        "write": torch.rand(batch, time, heads),
    }
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in tensors.items()}


def one_document(time: int) -> torch.Tensor:
    return torch.zeros(time, dtype=torch.long)


def some_documents(time: int) -> torch.Tensor:
    return (torch.rand(time) < 0.05).long().cumsum(0)


def all_of_one_token(time: int) -> torch.Tensor:
    return torch.arange(time)


def padding_at_the_end(time: int) -> torch.Tensor:
    return torch.where(torch.arange(time) < time * 2 // 3, torch.arange(time) // 20, -1)


def assert_same(given: dict[str, Any], segment_ids: torch.Tensor, tolerance: float, least: float = 1e-3) -> None:
    """Output and every gradient, in the norm of each, or in `least` where what is summed cancels."""
    segment_ids = segment_ids.to(DEVICE).expand(given["query"].shape[:2])
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in given.items()}
    found = gated_delta_rule(**given, segment_ids=segment_ids)
    expected = recurrent_gated_delta_rule(**exact, segment_ids=segment_ids)
    gradient = torch.randn_like(expected).to(found.dtype)
    ours = torch.autograd.grad(found, list(given.values()), gradient)
    theirs = torch.autograd.grad(expected, list(exact.values()), gradient.float())
    for name, a, b in zip(("out", *given), (found, *ours), (expected, *theirs), strict=True):
        assert (a.float() - b).norm() <= tolerance * b.norm().clamp_min(least), name


@pytest.mark.parametrize("time", [1, 63, 64, 65, 130])
def test_kernel_is_the_recurrence(time: int) -> None:
    assert_same(inputs(time), some_documents(time), FLOAT32)


@pytest.mark.parametrize("segments", [one_document, all_of_one_token, padding_at_the_end])
def test_any_cut_into_documents(segments: Any) -> None:
    assert_same(inputs(130), segments(130), FLOAT32)


@pytest.mark.parametrize(
    ("key_heads", "group", "key", "value"), [(1, 1, 16, 16), (2, 1, 32, 16), (1, 3, 16, 64), (2, 2, 64, 32)]
)
def test_any_heads(key_heads: int, group: int, key: int, value: int) -> None:
    given = inputs(66, batch=2, key_heads=key_heads, group=group, key=key, value=value)
    assert_same(given, torch.stack((some_documents(66), one_document(66))), FLOAT32)


@pytest.mark.parametrize("decay", [0.0, -100.0])
def test_extreme_decays(decay: float) -> None:
    given = inputs(70)
    given["log_decay"].data.fill_(decay)
    assert_same(given, some_documents(70), FLOAT32)


def test_keys_that_are_all_alike() -> None:
    # The powers of the triangular system would reach 1e17 here: what inverts by them fails.
    given = inputs(64)
    given["key"].data.copy_(given["key"].data[:, :1] + 0)
    given["log_decay"].data.fill_(-1e-3)
    given["write"].data.fill_(0.999)
    # A decay's gradient is a sum of terms near one that cancel to a thousandth: 128 of them have norm 11.
    assert_same(given, one_document(64), FLOAT32, least=11)


def test_writes_that_are_zero() -> None:
    given = inputs(65)
    given["write"].data[:, ::3] = 0
    assert_same(given, one_document(65), FLOAT32)


@pytest.mark.gpu
def test_bfloat16() -> None:  # Triton's interpreter has no bfloat16 products
    assert_same(inputs(130, dtype=torch.bfloat16), some_documents(130), BFLOAT16)


def test_slices_of_wider_rows_and_a_batch() -> None:
    wide = torch.randn(2, 65, 2, 3, 16, device=DEVICE)
    given = inputs(65, batch=2, key_heads=2, group=1)
    flat = wide.transpose(2, 3).reshape(2, 65, 96)
    apart = [flat[..., start : start + 32].unflatten(-1, (2, 16)) for start in (0, 32, 64)]
    assert not apart[0].is_contiguous()
    given |= {name: x.requires_grad_() for name, x in zip(("query", "key", "value"), apart, strict=True)}
    with torch.no_grad():
        for name in ("query", "key"):
            given[name].copy_(l2_normalize(given[name]))
    assert_same(given, some_documents(65), FLOAT32)


def test_documents_are_apart_to_the_last_bit() -> None:
    segment_ids = torch.tensor([0] * 40 + [1] + [2] * 60 + [3] * 29, device=DEVICE)[None]
    own, results = (segment_ids[0] == 2), []
    first = inputs(130)
    gradient = torch.randn_like(first["value"])
    for _ in range(2):
        others = inputs(130)
        given = {
            name: torch.where(own.view(1, -1, *[1] * (x.dim() - 2)), x, others[name]).detach().requires_grad_()
            for name, x in first.items()
        }
        mixed = torch.where(own.view(1, -1, 1, 1), gradient, torch.randn_like(gradient))
        out = gated_delta_rule(**given, segment_ids=segment_ids)
        results.append([x[:, own] for x in (out, *torch.autograd.grad(out, list(given.values()), mixed))])
    for name, a, b in zip(("out", *first), *results, strict=True):
        assert torch.equal(a, b), name


def test_what_the_kernel_does_not_take_is_refused() -> None:
    segment_ids = torch.zeros(1, 3, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="key head dim is 5"):
        gated_delta_rule(**inputs(3, key=5), segment_ids=segment_ids)
    given = inputs(3)
    with pytest.raises(ValueError, match="must have one dtype"):
        gated_delta_rule(**given | {"query": given["query"].bfloat16()}, segment_ids=segment_ids)
    assert gated_delta_rule(**inputs(0), segment_ids=segment_ids[:, :0]).shape == (1, 0, 2, 16)
