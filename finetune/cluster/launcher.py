"""The processes that started this rank and that it must not outlive.

They are known before anything is imported: `launch.sh` names itself and DeepSpeed's runner in the environment, and the
first statement of `train.py` records the parent. So a launcher that dies while the ranks start is noticed too: the
recorded parent is then not a launcher, or one of the named processes is gone.

Before the first step there is nothing to save, and the rank ends at once; from then on the watch over the rank stops
the run in order (finetune/run/watchdog.py).
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import psutil

PARENT = "NEXTUNE_PARENT"  # process id, by the first statement of train.py
STARTERS = "NEXTUNE_STARTERS"  # process ids, by launch.sh
SECONDS_BETWEEN_LOOKS = 1.0
LAUNCH, RUNNER = "deepspeed.launcher", "deepspeed"  # in the command lines of DeepSpeed's two processes


class Launcher:
    """What started this rank; watched from `begin` on."""

    def __init__(self, parent: int, starters: Sequence[int] = (), *, name: str = ""):
        """Nothing is watched yet.

        Args:
            parent: id of the process that started this one.
            starters: ids of further processes that must live.
            name: part of the parent's command line; a parent without it has adopted this process from one that died.
        """
        self.on_death: Callable[[], None] = _leave  # called once, when one of them has ended
        self._parent = parent
        self._starters = [_process(pid) for pid in starters]
        self._adopted = name not in _command_line(parent)

    def begin(self) -> None:
        """Look now, and from now on once a second in the background, whether all of them live."""
        if self.is_dead():
            self.on_death()
        else:
            threading.Thread(target=self._watch, daemon=True, name="launcher").start()

    def is_dead(self) -> bool:
        """Whether one of them has ended."""
        return self._adopted or os.getppid() != self._parent or not all(map(_lives, self._starters))

    def _watch(self) -> None:
        pause = threading.Event()
        while not self.is_dead():
            pause.wait(SECONDS_BETWEEN_LOOKS)
        self.on_death()


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """What started this rank, by the environment that it was started with; None when a user did so by hand."""
    parent = int(environment.get(PARENT, os.getppid()))
    starters = [int(word) for word in environment.get(STARTERS, "").split()]
    if "CROSS_RANK" in environment:  # DeepSpeed's launcher, which its runner started, or over several hosts a shell
        if not starters:
            starters = [_grandparent(parent, alone=environment.get("CROSS_SIZE") == "1")]
        return Launcher(parent, starters, name=LAUNCH)
    others = ("SLURM_PROCID", "TORCHELASTIC_RUN_ID")
    return Launcher(parent, starters) if starters or any(name in environment for name in others) else None


def _grandparent(parent: int, *, alone: bool) -> int:
    """The process that started our parent; 0, which is no process, if that has died already.

    Args:
        alone: whether this is the only host, so that DeepSpeed's runner is here.
    """
    process = _process(parent)
    try:
        above = process.ppid() if process else 0
    except psutil.Error:
        return 0
    # Process 1 adopts what is left behind. In a container it may be the runner itself.
    return 0 if alone and above == 1 and RUNNER not in _command_line(1) else above


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid) if pid else None
    except psutil.Error:
        return None


def _lives(process: psutil.Process | None) -> bool:
    """Whether this process, and not another one with its id, runs; a zombie does not."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""
    except psutil.AccessDenied:  # of another user, so not a process that we could judge
        return f"{LAUNCH} {RUNNER}"


def _leave() -> None:
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    with suppress(OSError):  # nobody may be listening
        print(
            f"nextune: rank {rank} on {host}: the launcher died before the first step, so this rank ends; nothing is"
            " lost, the same command starts again",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
