"""The delta rule by products, with its own backward pass, against the recurrence that defines it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.kernels.cpu.delta_rule_products import gated_delta_rule_by_products
from finetune.model.delta_rule import chunked_gated_delta_rule, recurrent_gated_delta_rule
from finetune.model.deltanet import l2_normalize
from tests.test_delta_rule import SEGMENTS, TIMES, assert_same, inputs, random_segments


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("segments", list(SEGMENTS))
def test_products_are_the_recurrence(segments: str, time: int) -> None:
    tensors, segment_ids = inputs(time), SEGMENTS[segments](time)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    found = gated_delta_rule_by_products(**tensors, segment_ids=segment_ids)
    assert_same(found, expected, tensors)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 16, 32, 128])
def test_any_chunk_size_is_the_recurrence(chunk_tokens: int) -> None:
    tensors, segment_ids = inputs(133), random_segments(133)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    found = gated_delta_rule_by_products(**tensors, segment_ids=segment_ids, chunk_tokens=chunk_tokens)
    assert_same(found, expected, tensors)


@pytest.mark.parametrize(("key_heads", "heads", "key", "value"), [(1, 1, 4, 4), (2, 2, 16, 3), (2, 8, 3, 16)])
def test_any_heads(key_heads: int, heads: int, key: int, value: int) -> None:
    tensors, segment_ids = inputs(70, key_heads=key_heads, key=key, value=value), random_segments(70)
    for name in ("value", "log_decay", "write"):
        tensors[name] = tensors[name].detach().repeat_interleave(2, dim=2)[:, :, :heads].requires_grad_()
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert_same(gated_delta_rule_by_products(**tensors, segment_ids=segment_ids), expected, tensors)


@pytest.mark.parametrize("decay", [0.0, -100.0])
def test_extreme_decays(decay: float) -> None:
    tensors, segment_ids = inputs(130), random_segments(130)
    tensors["log_decay"].data.fill_(decay)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert_same(gated_delta_rule_by_products(**tensors, segment_ids=segment_ids), expected, tensors)


def test_keys_that_are_all_alike() -> None:
    # Powers of the triangular system would reach 1e17 here: what inverts by them fails.
    tensors, segment_ids = inputs(64), SEGMENTS["one-document"](64)
    tensors["key"].data.copy_(tensors["key"].data[:, :1] + 0)
    tensors["log_decay"].data.fill_(-1e-3)
    tensors["write"].data.fill_(0.999)
    forms = gated_delta_rule_by_products, recurrent_gated_delta_rule
    outs = [form(**tensors, segment_ids=segment_ids) for form in forms]
    found, expected = ([out, *gradients(out, tensors)] for out in outs)
    for name, a, b in zip(("out", *tensors), found, expected, strict=True):
        # A decay's gradient is a sum of terms near one that cancel to a thousandth; rounding does not.
        assert (a - b).norm() <= 1e-5 * b.norm().clamp_min(b.numel() ** 0.5), name


def test_writes_that_are_zero() -> None:
    tensors, segment_ids = inputs(65), SEGMENTS["one-document"](65)
    tensors["write"].data[:, ::3] = 0
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert_same(gated_delta_rule_by_products(**tensors, segment_ids=segment_ids), expected, tensors)


def test_no_tokens() -> None:
    tensors = inputs(0)
    out = gated_delta_rule_by_products(**tensors, segment_ids=torch.zeros(2, 0, dtype=torch.long))
    assert out.shape == (2, 0, 6, 7)
    assert all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), list(tensors.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_float32_whatever_it_is_given(dtype: torch.dtype) -> None:
    tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs(66).items()}
    wide = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    segment_ids = random_segments(66)
    out, expected = (gated_delta_rule_by_products(**x, segment_ids=segment_ids) for x in (tensors, wide))
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    for a, b in zip(gradients(out, tensors), gradients(expected, wide), strict=True):
        assert torch.equal(a, b.to(dtype))


def test_slices_of_wider_rows() -> None:
    tensors, segment_ids = inputs(65), random_segments(65)
    rows = torch.randn(2, 65, 6, 20)
    apart = {"query": rows[:, :, :3, :5], "key": rows[:, :, 3:, 3:8], "value": rows[..., 9:16]}
    for name, x in apart.items():
        x.copy_(x if name == "value" else l2_normalize(x))
        tensors[name] = x.requires_grad_()
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert_same(gated_delta_rule_by_products(**tensors, segment_ids=segment_ids), expected, tensors)


def gradients(out: Tensor, tensors: dict[str, Any], seed: int = 3) -> list[Tensor]:
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return list(torch.autograd.grad(out, list(tensors.values()), given, retain_graph=True))


def test_backward_twice_and_computed_again_are_the_same() -> None:
    tensors, segment_ids = inputs(100), random_segments(100)
    out = gated_delta_rule_by_products(**tensors, segment_ids=segment_ids)
    first, second = gradients(out, tensors), gradients(out, tensors)
    again = checkpoint(gated_delta_rule_by_products, **tensors, segment_ids=segment_ids, use_reentrant=False)
    for a, b, c in zip(first, second, gradients(again, tensors), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_no_number_depends_on_the_rest_of_the_batch() -> None:
    tensors, segment_ids = inputs(130, batch=5, key=32, value=16), random_segments(130, batch=5)
    together = gated_delta_rule_by_products(**tensors, segment_ids=segment_ids)
    expected = torch.autograd.grad((together * together.detach()).sum(), list(tensors.values()))
    for place in range(5):
        own = {name: x.detach()[place : place + 1].clone().requires_grad_() for name, x in tensors.items()}
        alone = gated_delta_rule_by_products(**own, segment_ids=segment_ids[place : place + 1])
        assert torch.equal(alone, together[place : place + 1])
        found = torch.autograd.grad((alone * alone.detach()).sum(), list(own.values()))
        assert all(torch.equal(a[0], b[place]) for a, b in zip(found, expected, strict=True))


def test_documents_are_apart_to_the_last_bit() -> None:
    segment_ids = torch.tensor([0] * 40 + [1] + [2] * 60 + [3] * 29).expand(2, -1)
    own, results = (segment_ids[0] == 2), []
    first = inputs(130)
    given = torch.randn_like(first["value"])
    for _ in range(2):
        others = inputs(130)
        tensors = {
            name: torch.where(own.view(1, -1, *[1] * (x.dim() - 2)), x, others[name]).detach().requires_grad_()
            for name, x in first.items()
        }
        mixed = torch.where(own.view(1, -1, 1, 1), given, torch.randn_like(given))
        out = gated_delta_rule_by_products(**tensors, segment_ids=segment_ids)
        results.append([x[:, own] for x in (out, *torch.autograd.grad(out, list(tensors.values()), mixed))])
    for name, a, b in zip(("out", *first), *results, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("segments", ["one-document", "random"])
def test_as_exact_as_the_definition(segments: str) -> None:
    """At the widths of the embedded model and many tokens: nothing cancels here that does not cancel there too."""
    tensors, segment_ids = inputs(512, key_heads=2, key=64, value=64), SEGMENTS[segments](512)
    tensors["log_decay"].data.mul_(0.05)
    exact = _in_float64(tensors, segment_ids)
    errors = []
    for form in (gated_delta_rule_by_products, chunked_gated_delta_rule):
        out = form(**tensors, segment_ids=segment_ids)
        found = out, *gradients(out, tensors)
        errors.append([(a.double() - b).norm() for a, b in zip(found, exact, strict=True)])
    for name, error, allowed in zip(("out", *tensors), *errors, strict=True):
        assert error <= 2 * allowed, name


def _in_float64(tensors: dict[str, Tensor], segment_ids: Tensor) -> list[Tensor]:
    """Output and gradients of `recurrent_gated_delta_rule`, its steps in float64."""
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    query, key = (wide[name].repeat_interleave(2, dim=2) for name in ("query", "key"))
    state, outputs = wide["value"].new_zeros(*query[:, 0].shape, wide["value"].shape[-1]), []
    for t in range(query.shape[1]):
        continues = segment_ids[:, t] == segment_ids[:, max(t - 1, 0)]
        state = state * (wide["log_decay"][:, t].exp() * continues[:, None])[..., None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        correction = (wide["value"][:, t] - recalled) * wide["write"][:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    out = torch.stack(outputs, dim=1) * query.shape[-1] ** -0.5
    return [out, *gradients(out, wide)]
