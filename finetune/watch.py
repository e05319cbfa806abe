"""What can end a run from outside, noticed by every rank: a signal, a launcher that died, a step that never returns.

A scheduler's SIGTERM (or SIGUSR1) is a wish: the loop asks `asked_to_stop` after each step, saves, and leaves in order.
A launcher that was killed leaves its ranks behind without a word; the guard turns that into the same wish. A rank
that hangs, in a collective say, can do nothing for itself, so a timer outside Python's control writes the stack of
every thread to `crash/rankR.stack` and ends the process.
"""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STALL_SECONDS = 3600.0  # no step, evaluation or checkpoint takes an hour; a hang in a collective takes for ever
GUARD_SECONDS = 1.0  # between two looks at the launcher


class Watch:
    """Watches over one rank from `begin` to `end`."""

    def __init__(self, folder: Path, rank: int, stall_seconds: float):
        """Nothing is watched yet.

        Args:
            folder: of the run.
            stall_seconds: the longest that may pass between two beats.
        """
        self.asked_to_stop: str | None = None
        self._stack_path = folder / "crash" / f"rank{rank}.stack"
        self._stall_seconds = stall_seconds
        self._over = threading.Event()
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def begin(self, *, launched: bool) -> None:
        """Start watching. Call it in the main thread.

        Args:
            launched: whether a launcher started this process, whose death is then a wish to stop.
        """
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        if launched:
            threading.Thread(target=self._guard, args=(_ancestors(),), daemon=True).start()
        self._stack_path.parent.mkdir(parents=True, exist_ok=True)
        self._stack_file = self._stack_path.open("w")
        self.beat()

    def beat(self) -> None:
        """Say that this rank makes progress."""
        faulthandler.dump_traceback_later(self._stall_seconds, exit=True, file=self._stack_file)

    def end(self) -> None:
        """Stop watching; leaves no file behind."""
        faulthandler.cancel_dump_traceback_later()
        self._over.set()
        self._stack_file.close()
        self._stack_path.unlink(missing_ok=True)
        with suppress(OSError):  # another rank's file, or a crash record, is still in it
            self._stack_path.parent.rmdir()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked_to_stop is not None:  # asked twice: at once
            os._exit(128 + number)
        self.asked_to_stop = signal.Signals(number).name

    def _guard(self, expected: list[int]) -> None:
        while not self._over.wait(GUARD_SECONDS):
            if _ancestors() != expected:
                self.asked_to_stop = self.asked_to_stop or "the launcher died"
                return


def _ancestors() -> list[int]:
    """Process ids of the launcher's two processes: our parent and its parent."""
    try:
        return [os.getppid(), psutil.Process(os.getppid()).ppid()]
    except psutil.NoSuchProcess:
        return [os.getppid()]
