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

from finetune.parallel import world as worlds
from finetune.parallel.world import TIMEOUT
from finetune.watch import GRACE_SECONDS, STALL_SECONDS
from tests.ranks import ranks

ROOT = Path(__file__).resolve().parent.parent

RANK = """
import sys, time
from pathlib import Path
from finetune.watch import Watch
watch = Watch(Path(sys.argv[1]), 3, stall_seconds=float(sys.argv[2]), grace_seconds=2, repeat_seconds=2)
watch.begin(launched=True)
watch.heed_signals()
watch.beat()
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
def test_a_signal_is_a_wish_that_the_loop_grants(tmp_path: Path, number: signal.Signals) -> None:
    rank = start(tmp_path / "runs/tiny", 30, "beats")
    assert first_line(rank) == "ready\n"
    rank.send_signal(number)
    out, _ = rank.communicate(timeout=20)
    assert out == f"stopping: {number.name}\nFalse\n"
    assert rank.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_asked_twice_is_at_once(tmp_path: Path) -> None:
    rank = start(tmp_path, 30, "stubborn")
    assert first_line(rank) == "ready\n"
    rank.send_signal(signal.SIGTERM)
    assert first_line(rank) == "stopping: SIGTERM\n"
    time.sleep(2.5)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(timeout=10) == 128 + signal.SIGTERM


def test_the_same_wish_from_two_sides_is_one_wish(tmp_path: Path) -> None:
    """Who signals a whole group reaches the rank, and DeepSpeed's launcher, which hands it on milliseconds later."""
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


def test_a_signal_after_the_launcher_died_is_the_first_wish(tmp_path: Path) -> None:
    """`launch.sh`, which sees ranks left behind, sends one while they save."""
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
    assert 'File "<string>", line 11 in <module>' in stack


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


def test_the_watch_comes_before_every_timeout(tmp_path: Path) -> None:
    """The ranks of two groups of expert ranks, and the groups that an engine makes later."""
    assert timedelta(seconds=STALL_SECONDS + 2 * GRACE_SECONDS) <= TIMEOUT
    for expert_size, timeouts in ((2, ranks(2, timeouts_of_groups, 2)), (1, ranks(2, timeouts_of_groups, 1))):
        for of_rank in timeouts:
            assert len(of_rank) >= 2, expert_size
            assert set(of_rank) == {TIMEOUT}


def timeouts_of_groups(rank: int, expert_size: int) -> list[timedelta]:
    world = worlds.start(expert_size)
    assert (world.expert_group is None) == (expert_size == 1)
    groups = list(distributed_c10d._world.pg_map)
    assert world.expert_group is None or world.expert_group in groups
    as_started = [timeout_of(group) for group in groups]
    later = torch.distributed.new_group([0, 1])
    assert timeout_of(later) < TIMEOUT
    worlds.set_timeouts()
    return [*as_started, timeout_of(later)]


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
from finetune.watch import Watch
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
watch = Watch(folder, rank, stall_seconds=3, grace_seconds=20)
time.sleep(3 * rank)  # the ranks begin a step at different times
watch.begin(launched=False)
watch.beat()
try:
    if rank == 1:
        time.sleep(300)
    else:
        dist.all_reduce(torch.zeros(1))
finally:
    watch.end()
"""


def test_a_hang_of_one_rank_leaves_the_stacks_of_all(tmp_path: Path) -> None:
    """Rank 1 never comes to the collective that rank 0 waits in; rank 0, whose time is up first, ends both."""
    peers = [subprocess.Popen([sys.executable, "-c", PEERS, str(tmp_path), str(rank)], cwd=ROOT) for rank in range(2)]
    try:
        assert peers[0].wait(timeout=90) == 1
        peers[1].kill()  # as the launcher does to the others
        peers[1].wait()
    finally:
        for peer in peers:
            peer.kill()
    for rank, place in enumerate(("all_reduce", 'File "<string>", line 14 in <module>')):
        assert place in (tmp_path / "crash" / f"rank{rank}.stack").read_text()


def test_a_rank_that_loses_its_peer_in_a_hang_keeps_its_stack(tmp_path: Path) -> None:
    """The collective fails as soon as the other has ended; the stack of the hang is not taken for a leftover."""
    peers = [subprocess.Popen([sys.executable, "-c", PEERS, str(tmp_path), str(rank)], cwd=ROOT) for rank in range(2)]
    stack, end = tmp_path / "crash" / "rank0.stack", time.monotonic() + 60
    try:
        while not (stack.exists() and "all_reduce" in stack.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        peers[1].kill()
        assert peers[0].wait(timeout=15) == 1  # long before its own time is up
    finally:
        for peer in peers:
            peer.kill()
    assert "all_reduce" in stack.read_text()
