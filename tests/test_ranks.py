import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import ranks


def test_returns_what_each_rank_returns() -> None:
    results = ranks(2, sums_up, torch.tensor(3.0))
    assert [total.item() for total in results] == [7.0, 7.0]


def sums_up(rank: int, base: torch.Tensor) -> torch.Tensor:
    total = base + rank
    dist.all_reduce(total)
    return total


@pytest.mark.parametrize(
    ("failure", "message"),
    [("raises", r"rank 1:(?s:.*)the third shelf is empty"), ("dies", "rank 1 died with exit code -9")],
)
def test_a_failing_rank_ends_the_others_at_once_and_is_the_message(failure: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        ranks(2, fails_on_rank_1, failure, deadline_seconds=60)
    assert time.monotonic() - start < 30


def fails_on_rank_1(rank: int, failure: str) -> None:
    if rank == 1 and failure == "raises":
        raise ValueError("the third shelf is empty")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_stuck_rank_is_named_with_its_stack() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not finish in 15 s(?s:.*)in sleeps_on_rank_0"):
        ranks(2, sleeps_on_rank_0, deadline_seconds=15)


def sleeps_on_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(600)
