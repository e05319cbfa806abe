"""Documents packed into one sequence are exactly the documents run alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

from finetune.model.layers import positions_in_segments
from tests.configs import CONFIGS
from tests.test_model import LOGITS_TOLERANCE, assert_gradients_close, gradients, pair, random_model

# Two sequences of 140 positions: 1-token documents at the start, inside and at the end; documents shorter than the
# convolution, longer than a chunk of the delta rule, and ending on its edge; padding after the second.
PACKS = [[1, 70, 2, 1, 1, 64, 1], [63, 1, 3, 40, 1]]
TIME = 140


def pack(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random input ids, labels (the next token of the document) and segment ids of `PACKS`."""
    ids = torch.randint(vocabulary, (len(PACKS), TIME))
    segments = torch.full((len(PACKS), TIME), -1)
    labels = torch.full((len(PACKS), TIME), -100)
    for row, lengths in enumerate(PACKS):
        start = 0
        for segment, length in enumerate(lengths):
            segments[row, start : start + length] = segment
            labels[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            start += length
    return ids, labels, segments


def documents(segments: torch.Tensor) -> list[tuple[int, slice]]:
    """(row, positions) of every document."""
    found = []
    for row, lengths in enumerate(PACKS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
        assert (segments[row, start:] == -1).all()
    return found


@pytest.fixture(params=list(CONFIGS))
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def test_packed_logits_equal_each_document_alone_in_transformers(values: dict[str, Any]) -> None:
    ours, theirs = pair(values)
    ids, _, segments = pack(values["vocab_size"])
    with torch.no_grad():
        packed = ours(ids, segments).logits
        for row, place in documents(segments):
            alone = theirs(ids[row : row + 1, place], use_cache=False).logits
            torch.testing.assert_close(packed[row : row + 1, place], alone, rtol=0, atol=LOGITS_TOLERANCE)


def test_packed_gradients_equal_the_sum_over_documents_alone_in_transformers(values: dict[str, Any]) -> None:
    ours, theirs = pair(values)
    ids, labels, segments = pack(values["vocab_size"])
    ours(ids, segments, labels=labels).loss_sum.backward()
    for row, place in documents(segments):
        alone_sum(theirs, ids[row : row + 1, place]).backward()
    assert_gradients_close(gradients(ours), gradients(theirs))


def alone_sum(theirs: Qwen3NextForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = theirs(ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def test_nothing_crosses_a_document_boundary(values: dict[str, Any]) -> None:
    """Every position has a token of its own, so that the embedding's gradient says how much of whom was read."""
    model = random_model({**values, "vocab_size": TIME, "tie_word_embeddings": False})
    _, _, segments = pack(1)
    ids = torch.arange(TIME).unsqueeze(0)
    for row, place in documents(segments):
        if row == 1:
            continue
        model.zero_grad()
        model(ids, segments[:1]).logits[0, place].square().sum().backward()
        read = gradients(model)["model.embed_tokens.weight"].abs().sum(-1)
        assert read[place].min() > 0
        read[place] = 0
        assert read.max() == 0, f"the document at {place} reads {read.nonzero().flatten().tolist()}"


def test_padding_is_not_routed_and_its_tokens_do_not_matter(values: dict[str, Any]) -> None:
    model = random_model(values)
    ids, labels, segments = pack(values["vocab_size"])
    other = torch.where(segments == -1, (ids + 1) % values["vocab_size"], ids)
    first, second = (model(x, segments, labels=labels) for x in (ids, other))
    assert torch.equal(first.loss_sum, second.loss_sum)
    for routing in first.routings.values():
        assert len(routing.experts) == len(routing.logits) == sum(map(sum, PACKS))


def test_a_batch_of_padding_has_no_loss_and_finite_gradients(values: dict[str, Any]) -> None:
    model = random_model(values)
    shape = (2, 70)
    for recompute in (False, True):
        model.zero_grad()
        model.recompute = recompute
        out = model(torch.zeros(shape, dtype=torch.long), torch.full(shape, -1), labels=torch.full(shape, -100))
        assert out.loss_sum == 0
        assert out.token_count == 0
        routed = sum(routing.logits.sum() for routing in out.routings.values())
        (out.loss_sum + routed).backward()
        for name, gradient in gradients(model).items():
            assert not gradient.any(), name  # NaN would count as any


def test_a_sequence_of_padding_beside_a_full_one_changes_nothing() -> None:
    ours, theirs = pair(CONFIGS["base"])
    ids = torch.randint(96, (2, 70))
    segments = torch.stack((torch.zeros(70, dtype=torch.long), torch.full((70,), -1)))
    labels = torch.stack((ids[0].roll(-1), torch.full((70,), -100)))
    labels[0, -1] = -100
    out = ours(ids, segments, labels=labels)
    loss = alone_sum(theirs, ids[:1])
    torch.testing.assert_close(out.loss_sum, loss, rtol=1e-5, atol=0)
    out.loss_sum.backward()
    loss.backward()
    assert_gradients_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize(
    ("segments", "positions"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([0, 1, 1, 2], [0, 0, 1, 0]),
        ([5, 5, 0, -1, -1], [0, 1, 0, 0, 1]),
    ],
    ids=["one", "one-token-documents", "padding"],
)
def test_positions_start_again_with_every_document(segments: list[int], positions: list[int]) -> None:
    assert positions_in_segments(torch.tensor([segments])).tolist() == [positions]
