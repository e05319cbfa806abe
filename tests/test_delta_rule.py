"""The chunked delta rule against the recurrence, and the recurrence against transformers'."""

from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from finetune.model.delta_rule import chunked_gated_delta_rule, recurrent_gated_delta_rule
from finetune.model.deltanet import causal_convolution, l2_normalize

TIMES = [1, 2, 63, 64, 65, 130]


def inputs(time: int, batch: int = 2, key_heads: int = 3, key: int = 5, value: int = 7) -> dict[str, Any]:
    heads = 2 * key_heads
    tensors = {
        "query": l2_normalize(torch.randn(batch, time, key_heads, key)),
        "key": l2_normalize(torch.randn(batch, time, key_heads, key)),
        "value": torch.randn(batch, time, heads, value),
        # Some tokens forget almost all, some almost nothing.
        "log_decay": -torch.randn(batch, time, heads).exp(),
        "write": torch.rand(batch, time, heads),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def random_segments(time: int, batch: int = 2) -> torch.Tensor:
    """Documents of random length, many of one token."""
    return (torch.rand(batch, time) < 0.3).long().cumsum(1)


SEGMENTS = {
    "one-document": lambda time: torch.zeros(2, time, dtype=torch.long),
    "random": random_segments,
    "all-one-token": lambda time: torch.arange(time).expand(2, time),
    "padding-at-the-end": lambda time: torch.where(torch.arange(time) < time // 2, 0, -1).expand(2, time),
}


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("segments", list(SEGMENTS))
def test_chunked_is_the_recurrence(segments: str, time: int) -> None:
    tensors, segment_ids = inputs(time), SEGMENTS[segments](time)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    found = chunked_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert_same(found, expected, tensors)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 100])
def test_any_chunk_size_is_the_recurrence(chunk_tokens: int) -> None:
    tensors, segment_ids = inputs(65), random_segments(65)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    found = chunked_gated_delta_rule(**tensors, segment_ids=segment_ids, chunk_tokens=chunk_tokens)
    assert_same(found, expected, tensors)


def assert_same(found: torch.Tensor, expected: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), list(tensors.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(tensors.values()))
    for name, a, b in zip(tensors, ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1), name


@pytest.mark.parametrize("decay", [0.0, -100.0])
def test_extreme_decays_stay_finite(decay: float) -> None:
    tensors, segment_ids = inputs(130), random_segments(130)
    with torch.no_grad():
        tensors["log_decay"].fill_(decay)
    expected = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    found = chunked_gated_delta_rule(**tensors, segment_ids=segment_ids)
    assert found.isfinite().all()
    assert_same(found, expected, tensors)


def test_recurrence_is_transformers() -> None:
    tensors = inputs(65)
    found = recurrent_gated_delta_rule(**tensors, segment_ids=torch.zeros(2, 65, dtype=torch.long))
    expected, _ = torch_recurrent_gated_delta_rule(
        tensors["query"].repeat_interleave(2, dim=2),
        tensors["key"].repeat_interleave(2, dim=2),
        tensors["value"],
        g=tensors["log_decay"],
        beta=tensors["write"],
        initial_state=None,
        output_final_state=False,
    )
    assert_same(found, expected, tensors)


def test_recurrence_of_packed_documents_is_each_alone() -> None:
    tensors, segment_ids = inputs(40, batch=1), random_segments(40, batch=1)
    packed = recurrent_gated_delta_rule(**tensors, segment_ids=segment_ids)
    for segment in segment_ids.unique():
        place = (segment_ids[0] == segment).nonzero().squeeze(-1)
        own = {name: tensor[:, place] for name, tensor in tensors.items()}
        alone = recurrent_gated_delta_rule(**own, segment_ids=torch.zeros(1, len(place), dtype=torch.long))
        torch.testing.assert_close(packed[:, place], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 65])
def test_convolution_is_torchs_on_each_document(time: int, width: int) -> None:
    x, weight, segment_ids = torch.randn(1, time, 6), torch.randn(6, width), random_segments(time, batch=1)
    found = causal_convolution(x, weight, segment_ids)
    for segment in segment_ids.unique():
        place = (segment_ids[0] == segment).nonzero().squeeze(-1)
        channels_first = torch.nn.functional.pad(x[:, place].transpose(1, 2), (width - 1, 0))
        alone = torch.nn.functional.conv1d(channels_first, weight.unsqueeze(1), groups=6).transpose(1, 2)
        torch.testing.assert_close(found[:, place], alone)
