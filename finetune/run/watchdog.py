"""What can end a run from outside, noticed by every rank: a signal, a launcher that died, a hang.

Before the first step there is nothing to save, and a signal ends the process as it ends any other. From then on
SIGTERM or SIGUSR1, as a scheduler sends it, requests a graceful stop: the loop reads `asked_to_stop` after each step,
saves, and leaves in order. The same signal often arrives twice within moments, from the scheduler and from the
launcher; a repeat within `REPEAT_SECONDS` is ignored, a later one exits immediately. The death of the launcher requests
a graceful stop too.

Every loop that makes progress calls `beat`: reading data, weights and checkpoints, forward passes, writing. The run
stalls when no rank has done so for `STALL_SECONDS`; a rank that waits in a collective for one that works does not. The
ranks see each other's progress as the modification time of one file in the run folder, which they share. When the run
stalls, the guard of each rank writes the stack of every thread to `crash/rankR.stack`, and the rank ends a minute
later: the first one to end takes the others with it, and by then all have written. A timer outside Python's control
does both for a rank whose guard cannot run.
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

from finetune.cluster.launcher import Launcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The longest that a single operation takes which cannot report progress, such as one collective or one flush of a file.
STALL_SECONDS = 3600.0
GRACE_SECONDS = 60.0  # from the stack to the end of the process: the ranks notice a stall some seconds apart
REPEAT_SECONDS = 10.0  # a signal that comes again within these is the same request
GUARD_SECONDS = 10.0  # between two looks at the progress of all ranks


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
        """Nothing is watched yet. Made before any rank begins to, so that all know which folders do not exist yet.

        Args:
            folder: of the run; all ranks share it.
            stall_seconds: the longest time without progress on any rank.
            grace_seconds: how much later the rank ends.
            repeat_seconds: how long after the first signal another one is the same request.
        """
        self.asked_to_stop: str | None = None
        self._repeat_seconds = repeat_seconds
        self._signalled_at: float | None = None  # time.monotonic() of the first signal
        self._rank = rank
        self._stack_path = folder / "crash" / f"rank{rank}.stack"
        self._moved_path = folder / "crash" / ".progress"  # touched by every rank that makes progress
        self._missing = [place for place in (folder, *folder.parents) if not place.exists()]
        self._stall_seconds, self._grace_seconds = stall_seconds, grace_seconds
        self._beats = self._beats_seen = 0
        self._moved_at = 0  # modification time of the file, as this rank saw it last
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True, name="watch")
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def begin(self) -> None:
        """Watch the progress of all ranks from now on; signals when they are heeded."""
        with suppress(OSError):  # what is wrong with the run folder is reported by those who need it
            self._stack_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stack_file = self._stack_path.open("a")  # the stacks of an earlier hang stay
        except OSError:
            self._stack_file = Path(os.devnull).open("a")  # noqa: SIM115
        self._thread.start()

    def heed_signals(self, launcher: Launcher | None = None) -> None:
        """From now on a signal, or the death of the launcher, requests a graceful stop. Call it in the main thread."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        if launcher is not None:
            launcher.on_death = self._on_death

    def beat(self) -> None:
        """Note that this rank makes progress; any thread may."""
        self._beats += 1

    def end(self) -> None:
        """Stop watching; leaves nothing behind but the stack of a hang, and no folder that holds nothing."""
        if not self._thread.is_alive():  # it was not begun
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stack_file.close()
        with suppress(OSError):
            if self._stack_path.stat().st_size == 0:
                self._stack_path.unlink()
        with suppress(OSError):  # a rank that still works makes it again
            self._moved_path.unlink()
        for place in (self._stack_path.parent, *self._missing):
            with suppress(OSError):  # another rank's file, or what the run left, is in it
                place.rmdir()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_death(self) -> None:
        self.asked_to_stop = self.asked_to_stop or "the launcher died"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled_at is None:
            self._signalled_at, self.asked_to_stop = time.monotonic(), signal.Signals(number).name
        elif time.monotonic() - self._signalled_at > self._repeat_seconds:  # a second request
            os._exit(128 + number)

    def _guard(self) -> None:
        self._set_timer()
        stalls_at, is_written = time.monotonic() + self._stall_seconds, False
        while not self._over.wait(min(GUARD_SECONDS, self._stall_seconds / 10)):
            if self._any_rank_moved():
                self._set_timer()
                stalls_at, is_written = time.monotonic() + self._stall_seconds, False
            elif time.monotonic() > stalls_at and not is_written:
                is_written = True
                self._write_stack()

    def _set_timer(self) -> None:
        """End the process, with its stacks, unless this is called again in time."""
        faulthandler.dump_traceback_later(self._stall_seconds + self._grace_seconds, exit=True, file=self._stack_file)

    def _any_rank_moved(self) -> bool:
        """Whether this rank or another one has made progress since the last look. Tells the others of this one's."""
        beats, seen = self._beats, self._moved_at
        moved, self._beats_seen = beats != self._beats_seen, beats
        with suppress(OSError):  # a disk that is gone: what this rank does still counts
            # Opened each time, since a network disk then looks for news. A FIFO in its place would not be waited for.
            descriptor = os.open(self._moved_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                if moved:
                    os.utime(descriptor)
                self._moved_at = os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
        return moved or self._moved_at != seen

    def _write_stack(self) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stack_file.write(f"no progress for {self._stall_seconds:g} s, {when}\n")
        self._stack_file.flush()
        faulthandler.dump_traceback(self._stack_file, all_threads=True)
        with suppress(OSError):  # nobody may be listening
            print(
                f"nextune: rank {self._rank} on {socket.gethostname()}: no rank made progress for"
                f" {self._stall_seconds:g} s; the stacks of this one are in {self._stack_path}; it ends in"
                f" {self._grace_seconds:g} s unless the run goes on, and the same command continues from the newest"
                " checkpoint",
                file=sys.stderr,
                flush=True,
            )
