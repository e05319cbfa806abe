"""Packs hold every document once, waste little, and labels are the next token of the same document."""

import numpy as np
import pytest
import torch

from data.chat import Document
from data.packing import best_fit, collate, split_long, supervised_tokens


def document(*ids: int, trained: str | None = None) -> Document:
    mask = [mark == "x" for mark in trained] if trained is not None else [True] * len(ids)
    return Document(np.array(ids, np.int64), np.array(mask))


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition: longest first, into the fullest pack that still has room, the youngest of equals."""
    packs: list[list[int]] = []
    touched: list[int] = []  # when each pack last got a document
    for time, index in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        free = [capacity - sum(lengths[i] for i in pack) for pack in packs]
        fitting = [p for p in range(len(packs)) if free[p] >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda p: (free[p], -touched[p]))
            packs[best].append(index)
            touched[best] = time
        else:
            packs.append([index])
            touched.append(time)
    return packs


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_best_fit_is_its_definition(capacity):
    rng = np.random.default_rng(capacity)
    for count in (0, 1, 2, 150):
        lengths = rng.integers(1, capacity + 1, count).tolist()
        assert best_fit(lengths, capacity) == plain_best_fit(lengths, capacity)


def test_best_fit_keeps_every_document_and_fills_packs():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.3, 1.1, 20_000).astype(np.int64) + 1, 2048)
    packs = best_fit(lengths, 2048)
    assert sorted(index for pack in packs for index in pack) == list(range(20_000))
    assert max(lengths[pack].sum() for pack in packs) <= 2048
    assert lengths.sum() / (len(packs) * 2048) > 0.999


def test_a_document_longer_than_a_pack_is_our_mistake():
    with pytest.raises(AssertionError, match="document 1 has 9 tokens and a pack 8"):
        best_fit([3, 9], 8)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 100])
def test_pieces_of_a_long_text_predict_every_token_once(length):
    whole = document(*range(length))
    pieces = split_long(whole, 4)
    assert all(len(piece.ids) <= 4 for piece in pieces)
    assert [token for piece in pieces for token in piece.ids[1:].tolist()] == list(range(1, length))
    assert sum(map(supervised_tokens, pieces)) == supervised_tokens(whole) == length - 1
    assert all(len(piece.ids) > 1 for piece in pieces) or length == 1


def test_pieces_keep_the_mask():
    pieces = split_long(document(1, 2, 3, 4, 5, trained="..xx."), 3)
    assert [piece.trained.tolist() for piece in pieces] == [[False, False, True], [True, True, False]]


def test_a_batch_is_the_contract():
    packs = [
        [document(5, 6, 7, trained="..x"), document(8), document(9, 10)],
        [document(11, 12, 13, 14, 15, 16, 17)],
        [],
    ]
    batch = collate(packs, sequence_tokens=7, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 1], [11, 12, 13, 14, 15, 16, 17], [1] * 7]
    assert batch.labels.tolist() == [
        [-100, 7, -100, -100, 10, -100, -100],
        [12, 13, 14, 15, 16, 17, -100],
        [-100] * 7,
    ]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 2, 2, -1], [0] * 7, [-1] * 7]
    assert {tensor.dtype for tensor in batch} == {torch.int64}


def test_labels_never_cross_documents():
    rng = np.random.default_rng(1)
    documents = [Document(rng.integers(0, 99, n), rng.random(n) < 0.7) for n in rng.integers(1, 40, 200).tolist()]
    packs = best_fit([len(d.ids) for d in documents], 64)
    batch = collate([[documents[i] for i in pack] for pack in packs], sequence_tokens=64, pad_id=0)
    labelled = batch.labels != -100
    assert labelled.sum() == sum(map(supervised_tokens, documents))
    assert not labelled[:, -1].any()
    rows, columns = torch.nonzero(labelled, as_tuple=True)
    assert torch.equal(batch.labels[rows, columns], batch.input_ids[rows, columns + 1])
    assert torch.equal(batch.segment_ids[rows, columns], batch.segment_ids[rows, columns + 1])
    assert (batch.segment_ids[rows, columns] >= 0).all()
