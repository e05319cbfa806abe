"""Documents laid into packs of one fixed length, and packs stacked into the batch that the model reads."""

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
    """What the model reads: (packs, tokens) each, int64.

    `labels[b, t]` is the token that position t must predict (already shifted), or -100. `segment_ids` counts the
    documents of a pack from 0; -1 is padding, always at the end of the pack.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor


def best_fit(
    lengths: Sequence[int] | NDArray[np.int64], capacity: int, progress: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Best fit decreasing: the documents of each pack, by index. Every document goes where it leaves least free.

    Longest first, equal lengths in their order; of equally good packs the youngest. O(n log capacity).

    Args:
        progress: called for every document.
    """
    packs: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # free tokens -> packs that have so many, oldest first
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
    """Pieces of at most `capacity` tokens, each a document of its own.

    A piece begins with the last token of the one before, so that every token but the first is predicted exactly once.
    """
    starts = range(0, max(len(document.ids) - 1, 1), capacity - 1)
    return [Document(document.ids[s : s + capacity], document.trained[s : s + capacity]) for s in starts]


def supervised_tokens(document: Document) -> int:
    """Tokens of a document that have a label: the trained ones, but the first has nothing before it."""
    return int(document.trained[1:].sum())


def collate(packs: Sequence[Sequence[Document]], *, sequence_tokens: int, pad_id: int) -> Batch:
    """The packs as one batch. A pack without documents is all padding."""
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
