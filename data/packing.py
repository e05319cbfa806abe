"""Packing of documents into sequences of a fixed length, and collation of packs into the model's input."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.chat import Document

NO_LABEL = -100
PADDING = -1


class Batch(NamedTuple):
    """The model's input: three int64 tensors of shape (packs, tokens).

    `labels[b, t]` is the token to predict at position t (already shifted), or -100. `segment_ids` numbers the documents
    of a pack from 0; -1 is padding, always at the end of the pack.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor


def best_fit(
    lengths: Sequence[int] | NDArray[np.int64], capacity: int, progress: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Best fit decreasing: each document goes into the pack that it leaves with the least free space.

    Documents are taken longest first, equal lengths in their order; of equally good packs the newest is filled.
    O(n log capacity) for n documents.

    Args:
        lengths: tokens of each document, at most `capacity`.
        progress: called for every document.

    Returns:
        The document indices of each pack.
    """
    packs: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # free tokens -> packs with that much space, oldest first
    free_sizes: list[int] = []  # the keys of by_free, ascending
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        progress()
        length = int(lengths[index])
        assert 0 < length <= capacity, f"document {index} has {length} tokens and a pack {capacity}"
        slot = bisect_left(free_sizes, length)
        if slot == len(free_sizes):
            pack, free = len(packs), capacity
            packs.append([])
        else:
            free = free_sizes[slot]
            pack = by_free[free].pop()
            if not by_free[free]:
                del by_free[free], free_sizes[slot]
        packs[pack].append(index)
        left = free - length
        if left and left not in by_free:
            by_free[left] = []
            insort(free_sizes, left)
        if left:
            by_free[left].append(pack)
    return packs


def split_long(document: Document, capacity: int) -> list[Document]:
    """Split a document into documents of at most `capacity` tokens.

    Each starts with the last token of the previous one, so every token but the first is predicted exactly once.
    """
    starts = range(0, max(len(document.ids) - 1, 1), capacity - 1)
    return [Document(document.ids[s : s + capacity], document.trained[s : s + capacity]) for s in starts]


def supervised_tokens(document: Document) -> int:
    """The number of tokens with a label: trained ones, without the first token, which has no context."""
    return int(document.trained[1:].sum())


def collate(packs: Sequence[Sequence[Document]], *, sequence_tokens: int, pad_id: int) -> Batch:
    """Collate packs into one batch. A pack without documents is all padding."""
    ids = np.full((len(packs), sequence_tokens), pad_id, np.int64)
    labels = np.full((len(packs), sequence_tokens), NO_LABEL, np.int64)
    segments = np.full((len(packs), sequence_tokens), PADDING, np.int64)
    for row, documents in enumerate(packs):
        start = 0
        for segment, document in enumerate(documents):
            end = start + len(document.ids)
            ids[row, start:end] = document.ids
            segments[row, start:end] = segment
            labels[row, start : end - 1] = np.where(document.trained[1:], document.ids[1:], NO_LABEL)
            start = end
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(segments))
