"""A rank notices a signal, a dead launcher and a hang; seen from another process."""

import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d

from finetune.distributed import world as worlds
from finetune.distributed.world import TIMEOUT, UNWATCHED_TIMEOUT
from finetune.run.watchdog import GRACE_SECONDS, STALL_SECONDS
from tests.ranks import ranks

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import os, sys, time
from pathlib import Path
import psutil
from finetune.cluster.launcher import Launcher
from finetune.run.watchdog import Watch
watch = Watch(Path(sys.argv[1]), 3, stall_seconds=float(sys.argv[2]), grace_seconds=2, repeat_seconds=2)
launcher = Launcher(os.getppid(), [psutil.Process(os.getppid()).ppid()])
launcher.begin()
watch.begin()
watch.heed_signals(launcher)
print("ready", flush=True)
if sys.argv[3] == "hangs":
    time.sleep(60)
while watch.asked_to_stop is None:
    time.sleep(0.05)
    if sys.argv[3] == "beats":
        watch.beat()
print("stopping:", watch.asked_to_stop, flush=True)
if sys.argv[3] == "saves":
    time.sleep(1)
if sys.argv[3] == "stubborn":
    time.sleep(60)
watch.end()
print(Path(sys.argv[1]).exists(), flush=True)
"""
# As DeepSpeed's: a runner that starts a launcher that starts the rank, whose output is ours.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def start(folder: Path, stall_seconds: float, manner: str, *, above: int = 0) -> "subprocess.Popen[str]":
    command = [RANK, str(folder), str(stall_seconds), manner]
    for _ in range(above):
        command = [LAUNCHER, *command]
    return subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_requests_a_graceful_stop(tmp_path: Path, number: signal.Signals) -> None:
    rank = start(tmp_path / "runs/tiny", 30, "beats")
    assert first_line(rank) == "ready\n"
    rank.send_signal(number)
    out, _ = rank.communicate(timeout=20)
    assert out == f"stopping: {number.name}\nFalse\n"
    assert rank.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_later_repeat_exits_immediately(tmp_path: Path) -> None:
    rank = start(tmp_path, 30, "stubborn")
    assert first_line(rank) == "ready\n"
    rank.send_signal(signal.SIGTERM)
    assert first_line(rank) == "stopping: SIGTERM\n"
    time.sleep(2.5)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_repeat_within_moments_is_ignored(tmp_path: Path) -> None:
    """A signal to a whole group reaches the rank, and DeepSpeed's launcher, which sends it again milliseconds later."""
    rank = start(tmp_path, 30, "saves")
    assert first_line(rank) == "ready\n"
    rank.send_signal(signal.SIGTERM)
    assert first_line(rank) == "stopping: SIGTERM\n"
    rank.send_signal(signal.SIGTERM)
    assert rank.communicate(timeout=20)[0] == "True\n"
    assert rank.returncode == 0


def test_the_death_of_the_launchers_parent_is_noticed(tmp_path: Path) -> None:
    runner = start(tmp_path, 30, "beats", above=2)
    assert first_line(runner) == "ready\n"
    runner.kill()  # the launcher lives on and waits for its rank, which would train on for nobody
    assert first_line(runner) == "stopping: the launcher died\n"


def test_a_signal_after_the_launcher_died_is_the_first_one(tmp_path: Path) -> None:
    """`launch.sh`, which finds ranks left behind, sends one while they save."""
    runner = start(tmp_path, 30, "stubborn", above=2)
    assert first_line(runner) == "ready\n"
    launcher = psutil.Process(runner.pid).children()[0]
    rank = launcher.children()[0]
    runner.kill()
    assert first_line(runner) == "stopping: the launcher died\n"
    time.sleep(2.5)
    rank.terminate()
    with pytest.raises(psutil.TimeoutExpired):
        rank.wait(timeout=3)
    rank.terminate()
    rank.wait(timeout=10)


def test_a_hang_leaves_the_stack_of_every_thread(tmp_path: Path) -> None:
    rank = start(tmp_path, 2, "hangs")
    began = time.monotonic()
    assert first_line(rank) == "ready\n"
    assert rank.wait(timeout=20) == 1
    assert time.monotonic() - began >= 2
    stack = (tmp_path / "crash" / "rank3.stack").read_text()
    assert stack.startswith("no progress for 2 s, 20")
    assert "Timeout" in stack  # the timer's own, with which the process ended
    assert "most recent call first" in stack
    assert 'File "<string>", line 14 in <module>' in stack


def test_a_later_start_keeps_the_stack_of_an_earlier_hang(tmp_path: Path) -> None:
    assert start(tmp_path, 1, "hangs").wait(timeout=20) == 1
    stack = (tmp_path / "crash/rank3.stack").read_text()
    rank = start(tmp_path, 30, "beats")
    assert first_line(rank) == "ready\n"
    rank.terminate()
    assert rank.wait(timeout=10) == 0
    assert (tmp_path / "crash/rank3.stack").read_text() == stack
    assert start(tmp_path, 1, "hangs").wait(timeout=20) == 1
    both = (tmp_path / "crash/rank3.stack").read_text()
    assert both.startswith(stack)
    assert both.count("no progress for 1 s") == 2


def test_no_collective_times_out_while_another_rank_makes_progress() -> None:
    """The ranks of two groups of expert ranks, and the groups that an engine makes later.

    Until the watch begins, a time-out as long as the longest stall; from then on the watch finds what hangs.
    """
    assert timedelta(seconds=STALL_SECONDS + 2 * GRACE_SECONDS) <= UNWATCHED_TIMEOUT
    assert timedelta(days=1) <= TIMEOUT
    for expert_size, timeouts in ((2, ranks(2, timeouts_of_groups, 2)), (1, ranks(2, timeouts_of_groups, 1))):
        for unwatched, watched in timeouts:
            assert len(unwatched) >= 2, expert_size
            assert set(unwatched) == {UNWATCHED_TIMEOUT}
            assert len(watched) == len(unwatched) + 1
            assert set(watched) == {TIMEOUT}


def timeouts_of_groups(rank: int, expert_size: int) -> tuple[list[timedelta], list[timedelta]]:
    world = worlds.start(expert_size)
    assert (world.expert_group is None) == (expert_size == 1)
    groups = list(distributed_c10d._world.pg_map)
    assert world.expert_group is None or world.expert_group in groups
    as_started = [timeout_of(group) for group in groups]
    later = torch.distributed.new_group([0, 1])
    assert timeout_of(later) < UNWATCHED_TIMEOUT
    worlds.set_timeouts()
    world.barrier()  # a rank that ends while the other still connects to the new group would fail it
    return as_started, [timeout_of(group) for group in (*groups, later)]


def timeout_of(group: torch.distributed.ProcessGroup) -> timedelta:
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout


def test_beats_put_the_end_off(tmp_path: Path) -> None:
    rank = start(tmp_path, 1, "beats")
    assert first_line(rank) == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(timeout=3)
    rank.terminate()
    assert rank.wait(timeout=10) == 0


PEERS = """
import sys, time, datetime
from pathlib import Path
import torch, torch.distributed as dist
from finetune.run.watchdog import Watch
folder, rank, works = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
watch = Watch(folder, rank, stall_seconds=2, grace_seconds=20)
time.sleep(rank)  # the ranks begin at different times
watch.begin()
try:
    if rank == 1:
        end = time.monotonic() + works
        while time.monotonic() < end:  # alone: the other one waits
            watch.beat()
            time.sleep(0.1)
        if sys.argv[4] == "hangs":
            time.sleep(300)
    dist.all_reduce(torch.zeros(1))
finally:
    watch.end()
"""


def peers_of(folder: Path, works: float, then: str) -> "list[subprocess.Popen[bytes]]":
    command = [sys.executable, "-c", PEERS, str(folder)]
    return [subprocess.Popen([*command, str(rank), str(works), then], cwd=ROOT) for rank in range(2)]


def test_a_rank_that_waits_for_one_that_works_does_not_stall(tmp_path: Path) -> None:
    """Four times as long as nothing may move on any rank."""
    peers = peers_of(tmp_path, 8, "joins")
    try:
        assert [peer.wait(timeout=90) for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            peer.kill()
    assert not (tmp_path / "crash").exists()


def test_a_hang_of_one_rank_leaves_the_stacks_of_all(tmp_path: Path) -> None:
    """Rank 1 works for a while and then hangs; rank 0, which waits for it in a collective, ends both."""
    peers = peers_of(tmp_path, 3, "hangs")
    stacks = [tmp_path / "crash" / f"rank{rank}.stack" for rank in range(2)]
    places = ("all_reduce", 'File "<string>", line 18 in <module>')
    try:
        end = time.monotonic() + 60
        while not all(
            stack.exists() and place in stack.read_text() for stack, place in zip(stacks, places, strict=True)
        ):
            assert time.monotonic() < end
            time.sleep(0.05)
        peers[1].kill()
        assert peers[0].wait(timeout=15) == 1  # the collective fails as soon as the other rank has ended
    finally:
        for peer in peers:
            peer.kill()
    for stack, place in zip(stacks, places, strict=True):  # the stack of the hang is not removed as a leftover
        assert stack.read_text().startswith("no progress for 2 s, 20")
        assert place in stack.read_text()
