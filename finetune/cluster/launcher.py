"""The processes that started this rank; their death ends the rank.

They are recorded before anything is imported: `launch.sh` puts its own process id and that of DeepSpeed's runner into
the environment, and the first statement of `train.py` records the parent. So the death of a launcher during start-up is
noticed too: the recorded parent is then not a launcher, or one of the recorded processes no longer exists.

Before the first step there is nothing to save, and the rank exits immediately. Afterwards the watchdog stops the run
gracefully (finetune/run/watchdog.py).
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import psutil

PARENT = "NEXTUNE_PARENT"  # process id, set by the first statement of train.py
STARTERS = "NEXTUNE_STARTERS"  # process ids, set by launch.sh
SECONDS_BETWEEN_LOOKS = 1.0
LAUNCH, RUNNER = "deepspeed.launcher", "deepspeed"  # in the command lines of DeepSpeed's two processes


class Launcher:
    """The processes that started this rank, watched after `begin`."""

    def __init__(self, parent: int, starters: Sequence[int] = (), *, name: str = ""):
        """Record the processes; watching starts with `begin`.

        Args:
            parent: id of the process that started this one.
            starters: ids of further processes to watch.
            name: part of the parent's command line; a parent without it adopted this process after the launcher died.
        """
        self.on_death: Callable[[], None] = _leave  # called once, when one of the processes has ended
        self._parent = parent
        self._starters = [_process(pid) for pid in starters]
        self._adopted = name not in _command_line(parent)

    def begin(self) -> None:
        """Check now, then every second in a background thread, that all processes are alive."""
        if self.is_dead():
            self.on_death()
        else:
            threading.Thread(target=self._watch, daemon=True, name="launcher").start()

    def is_dead(self) -> bool:
        """Whether one of the processes has ended."""
        return self._adopted or os.getppid() != self._parent or not all(map(_lives, self._starters))

    def _watch(self) -> None:
        pause = threading.Event()
        while not self.is_dead():
            pause.wait(SECONDS_BETWEEN_LOOKS)
        self.on_death()


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """The processes that started this rank, from its environment; None if it was started by hand."""
    parent = int(environment.get(PARENT, os.getppid()))
    starters = [int(word) for word in environment.get(STARTERS, "").split()]
    if "CROSS_RANK" in environment:  # DeepSpeed's launcher, started by its runner or, on several hosts, by a shell
        if not starters:
            starters = [_grandparent(parent, alone=environment.get("CROSS_SIZE") == "1")]
        return Launcher(parent, starters, name=LAUNCH)
    others = ("SLURM_PROCID", "TORCHELASTIC_RUN_ID")
    return Launcher(parent, starters) if starters or any(name in environment for name in others) else None


def _grandparent(parent: int, *, alone: bool) -> int:
    """The parent of our parent; 0, which is no process, if it has already died.

    Args:
        alone: whether this is the only host, so that DeepSpeed's runner is on it.
    """
    process = _process(parent)
    try:
        above = process.ppid() if process else 0
    except psutil.Error:
        return 0
    # Process 1 adopts orphans. In a container it may be the runner itself.
    return 0 if alone and above == 1 and RUNNER not in _command_line(1) else above


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid) if pid else None
    except psutil.Error:
        return None


def _lives(process: psutil.Process | None) -> bool:
    """Whether the process itself, not another with the same id, is running; a zombie is not."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""
    except psutil.AccessDenied:  # another user's process, which cannot be checked
        return f"{LAUNCH} {RUNNER}"


def _leave() -> None:
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    with suppress(OSError):  # standard error may be closed
        print(
            f"nextune: rank {rank} on {host}: the launcher died before the first step, so this rank ends; nothing is"
            " lost, the same command starts again",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
