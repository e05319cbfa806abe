"""What can end a run from outside, noticed by every rank: a signal, a launcher that died, a step that never returns.

While a run is put together a signal ends it as it ends any process, since there is nothing to save. From the first step
on SIGTERM or SIGUSR1, as a scheduler sends it, is a wish: the loop asks `asked_to_stop` after each step, saves, and
leaves in order. The same signal often comes twice at once, from whoever stops the job and from the launcher that it
stops; only one that comes later means at once. A launcher that was killed leaves its ranks behind without a word; the
guard turns that into the same wish.

When a step does not return, on this rank or because another hangs, the guard writes the stack of every thread to
`crash/rankR.stack`. The rank ends a minute later: when the first one ends the others are ended with it, and by then all
of them have written. A timer outside Python's control does both for a rank whose guard cannot run.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# No step, evaluation or checkpoint takes an hour; a hang in a collective takes for ever. Stall and twice the grace are
# shorter than the timeout of every collective (finetune/parallel/world.py), whose error would come without a stack.
STALL_SECONDS = 3600.0
GRACE_SECONDS = 60.0  # from the stack to the end: the ranks notice a hang as far apart as they began the step
REPEAT_SECONDS = 10.0  # a signal that comes again within these is still the first wish
GUARD_SECONDS = 1.0  # between two looks at the launcher and the clock


class Watch:
    """Watches over one rank from `begin` to `end`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        stall_seconds: float,
        grace_seconds: float = GRACE_SECONDS,
        repeat_seconds: float = REPEAT_SECONDS,
    ):
        """Nothing is watched yet. Made before any rank begins to, so that all know which folders are not there yet.

        Args:
            folder: of the run.
            stall_seconds: the longest that may pass between two beats.
            grace_seconds: how much later the rank ends.
            repeat_seconds: how long after the first signal another one is not yet a second wish.
        """
        self.asked_to_stop: str | None = None
        self._repeat_seconds = repeat_seconds
        self._signalled_at: float | None = None  # time.monotonic() of the first signal
        self._rank = rank
        self._stack_path = folder / "crash" / f"rank{rank}.stack"
        self._missing = [place for place in (folder, *folder.parents) if not place.exists()]
        self._stall_seconds, self._grace_seconds = stall_seconds, grace_seconds
        self._launcher: list[int] | None = None
        self._stall_at = float("inf")  # time.monotonic(), infinite once the stack of this stall is written
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True)
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def begin(self, *, launched: bool) -> None:
        """Start watching: the launcher at once, progress from the first beat on, signals when they are heeded.

        Args:
            launched: whether a launcher started this process, whose death is then a wish to stop.
        """
        if launched:
            self._launcher = _ancestors()
        with suppress(OSError):  # the run folder's mistakes are told by those who need it
            self._stack_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stack_file = self._stack_path.open("a")  # what an earlier hang left stays
        except OSError:
            self._stack_file = Path(os.devnull).open("a")  # noqa: SIM115
        self._thread.start()

    def heed_signals(self) -> None:
        """From now on take a signal as a wish. Call it in the main thread."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)

    def beat(self) -> None:
        """Say that this rank makes progress."""
        self._stall_at = time.monotonic() + self._stall_seconds
        end = self._stall_seconds + self._grace_seconds
        faulthandler.dump_traceback_later(end, exit=True, file=self._stack_file)

    def end(self) -> None:
        """Stop watching; leaves nothing behind but the stack of a hang, and no folder that holds nothing."""
        if not self._thread.is_alive():  # it was not begun
            return
        faulthandler.cancel_dump_traceback_later()
        self._over.set()
        self._thread.join()
        self._stack_file.close()
        with suppress(OSError):
            if self._stack_path.stat().st_size == 0:
                self._stack_path.unlink()
        for place in (self._stack_path.parent, *self._missing):
            with suppress(OSError):  # another rank's file, or what the run left, is in it
                place.rmdir()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled_at is None:
            self._signalled_at, self.asked_to_stop = time.monotonic(), signal.Signals(number).name
        elif time.monotonic() - self._signalled_at > self._repeat_seconds:  # asked twice: at once
            os._exit(128 + number)

    def _guard(self) -> None:
        while not self._over.wait(GUARD_SECONDS):
            if self._launcher is not None and _ancestors() != self._launcher:
                self.asked_to_stop = self.asked_to_stop or "the launcher died"
                self._launcher = None
            if time.monotonic() > self._stall_at:
                self._stall_at = float("inf")
                self._write_stack()

    def _write_stack(self) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stack_file.write(f"no progress for {self._stall_seconds:g} s, {when}\n")
        self._stack_file.flush()
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        with suppress(OSError):  # nobody may be listening
            print(
                f"nextune: rank {self._rank} on {socket.gethostname()}: no progress for {self._stall_seconds:g} s;"
                f" where it stands is in {self._stack_path}; it ends in {self._grace_seconds:g} s unless it goes on,"
                " and the same command continues from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )


def _ancestors() -> list[int]:
    """Process ids of the launcher's two processes: our parent and its parent."""
    try:
        return [os.getppid(), psutil.Process(os.getppid()).ppid()]
    except psutil.NoSuchProcess:
        return [os.getppid()]
