"""The order of packs: a pure function of (seed, epoch, position), the same for every number of ranks."""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset
from data.packing import Batch
from data.sources import DataError

# An epoch that no training reaches; the probe is drawn from its order.
PROBE_EPOCH = 2**63


def epoch_order(packs: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of all packs for one epoch."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(packs)


class Loader:
    """An endless iterator over one rank's part of every optimizer step; a step may span two epochs.

    The packs of a step are assigned, in order, to micro-batches and within each to ranks, so the step as a whole
    depends only on `ranks x micro_batches_per_step x packs_per_micro_batch`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        packs_per_micro_batch: int,
        micro_batches_per_step: int,
        rank: int,
        ranks: int,
        seed: int,
    ) -> None:
        assert 0 <= rank < ranks, f"rank {rank} of {ranks}"
        self._dataset = dataset
        self._shape = (micro_batches_per_step, ranks, packs_per_micro_batch)
        self._rank = rank
        self._seed = seed
        self._epoch = 0
        self._cursor = 0
        self._order = epoch_order(len(dataset), seed=seed, epoch=0)
        # Packs of the last step: (micro-batches, ranks, packs of a micro-batch).
        self.packs: NDArray[np.int64] = np.empty((0, ranks, packs_per_micro_batch), np.int64)

    def next_step(self) -> list[Batch]:
        """The micro-batches of this rank in the next optimizer step."""
        self.packs = self._take(int(np.prod(self._shape))).reshape(self._shape)
        return [self._dataset.batch(packs) for packs in self.packs[:, self._rank]]

    def state(self) -> dict[str, int | str]:
        """The position in the data; the same on every rank, and valid for any number of ranks."""
        return {"data": self._dataset.sha256, "seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Continue from `state`: the next step is the one that followed it.

        Raises:
            DataError: the state belongs to other data or another seed.
        """
        for name, mine, change in (
            ("data", self._dataset.sha256, "data, tokenizer, train.sequence_tokens or packing changed"),
            ("seed", self._seed, "train.seed changed"),
        ):
            if state[name] != mine:
                raise DataError(
                    f"the checkpoint's place in the data does not fit: {name} was {state[name]} and is {mine} "
                    f"({change}); undo the change, or start a new run under another name"
                )
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._order = epoch_order(len(self._dataset), seed=self._seed, epoch=self._epoch)

    def _take(self, count: int) -> NDArray[np.int64]:
        taken: list[NDArray[np.int64]] = []
        while count:
            if self._cursor == len(self._order):
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = epoch_order(len(self._dataset), seed=self._seed, epoch=self._epoch)
            part = self._order[self._cursor : self._cursor + count]
            taken.append(part)
            self._cursor += len(part)
            count -= len(part)
        return np.concatenate(taken)


class EvaluationBatches(Sequence[Batch]):
    """One rank's part of a single pass over all packs: the same number of batches on every rank, the last ones padded.

    Micro-batches are assigned to the ranks in turn, and read on access.
    """

    def __init__(self, dataset: Dataset, *, packs_per_micro_batch: int, rank: int, ranks: int) -> None:
        self._dataset, self._packs, self._rank, self._ranks = dataset, packs_per_micro_batch, rank, ranks

    def __len__(self) -> int:
        return -(-len(self._dataset) // (self._ranks * self._packs))

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        first = (range(len(self))[place] * self._ranks + self._rank) * self._packs
        packs = range(first, min(first + self._packs, len(self._dataset)))
        return self._dataset.batch(packs, at_least=self._packs)


def probe_batch(dataset: Dataset, *, packs: int, seed: int) -> Batch:
    """A fixed sample of packs for comparing models, the same on every rank; smaller if the data has fewer packs."""
    return dataset.batch(epoch_order(len(dataset), seed=seed, epoch=PROBE_EPOCH)[:packs])
