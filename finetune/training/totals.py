"""Sums since the last report, accumulated on the device and copied to the host once per report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.model import PADDING, Output


@dataclass(frozen=True)
class Totals:
    """Sums over every micro-batch of every rank in a window, on the host."""

    loss_sum: float
    supervised_tokens: int
    tokens: int  # padding excluded
    z_sums: NDArray[np.float64]  # (layers,) squared log-sum-exp of the router logits
    rows: NDArray[np.int64]  # (layers, experts) rows received
    probability_sums: NDArray[np.float64]  # (layers, experts)

    @property
    def balance_loss(self) -> NDArray[np.float64]:
        """Load-balancing loss of each layer over the whole window, 1 for even load; see `losses.load_balance`."""
        share = self.rows / np.maximum(self.rows.sum(1, keepdims=True), 1)
        probability = self.probability_sums / max(self.tokens, 1)
        return self.rows.shape[1] * (share * probability).sum(1)

    @property
    def z_loss(self) -> NDArray[np.float64]:
        """Router z-loss of each layer, mean over tokens."""
        return self.z_sums / max(self.tokens, 1)


class Windows:
    """Sums since the last report and since the last routing record, which are due at different steps.

    Sums are float64, exact for counts below 2^53. Only the differentiated forward pass is counted; a recomputed layer
    does not return its routing again.
    """

    def __init__(self, layers: int, experts: int, device: torch.device):
        self.layers, self.experts = layers, experts
        self.sums = torch.zeros(2, 3 + layers + 2 * layers * experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, output: Output, batch: Batch, rows: Tensor) -> None:
        """Add one micro-batch of this rank; `rows` received by each expert are (layers, experts)."""
        assert output.loss_sum is not None, "a window counts forward passes with labels"
        assert output.token_count is not None, "a window counts forward passes with labels"
        tokens = (batch.segment_ids != PADDING).sum()
        routings = output.routings.values()
        z, probability = (
            torch.stack(sums) for sums in zip(*((r.z_sum, r.probability_sum) for r in routings), strict=True)
        )
        head = torch.stack((output.loss_sum.double(), output.token_count.double(), tokens.double()))
        self.sums += torch.cat((head, z, rows.double().flatten(), probability.flatten()))

    def close(self, world: World, *, report: bool, routing: bool) -> tuple[Totals, Totals]:
        """Return the totals of both windows, and start a new window for each that is due.

        Communicates: one all-reduce and one copy to the host.
        """
        since_report, since_routing = world.sum(self.sums.clone()).cpu().numpy()
        for place, due in enumerate((report, routing)):
            if due:
                self.sums[place].zero_()
        return self._totals(since_report), self._totals(since_routing)

    def _totals(self, sums: NDArray[np.float64]) -> Totals:
        layers, size = self.layers, self.layers * self.experts
        head, z, rows, probability = np.split(sums, np.cumsum([3, layers, size]))
        table = (layers, self.experts)
        return Totals(
            float(head[0]),
            int(head[1]),
            int(head[2]),
            z,
            rows.astype(np.int64).reshape(table),
            probability.reshape(table),
        )


class Clock:
    """Seconds of training since the last report, without evaluation and blocking parts of checkpoints.

    A checkpoint stores them with the sums of the window, because a window may span a restart.
    """

    def __init__(self, seconds: float = 0.0):
        """Start stopped, at `seconds`."""
        self._counted = seconds
        self._running_since: float | None = None  # time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._counted + running

    def start(self) -> None:
        """Start to count."""
        assert self._running_since is None, "the clock runs already"
        self._running_since = time.perf_counter()

    def restart(self) -> None:
        """Reset to 0 and start to count."""
        self._counted, self._running_since = 0.0, time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Pause inside the block."""
        self._counted, self._running_since = self.seconds, None
        yield
        self.start()
