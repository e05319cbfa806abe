"""Handles events that end a run from outside: a signal, the death of the launcher, a hang.

Before the first step there is nothing to save, and a signal ends the process as usual. From then on SIGTERM or SIGUSR1,
as a scheduler sends it, requests a graceful stop: the training loop reads `asked_to_stop` after each step, saves, and
exits. Scheduler and launcher often send the same signal twice; a repeat within `REPEAT_SECONDS` is ignored, a later one
exits immediately. The death of the launcher also requests a graceful stop.

Every loop that makes progress calls `beat`: reading data, weights and checkpoints, forward passes, writing. The run
stalls when no rank has called it for `STALL_SECONDS`; a rank that waits in a collective for a working rank is not
stalled. Ranks share their progress as the modification time of one file in the run folder. When the run stalls, the
guard thread of each rank writes the stack of every thread to `crash/rankR.stack`, and the rank ends `GRACE_SECONDS`
later. The first rank to end also ends the others, which by then have written their stacks. If the guard thread cannot
run, a timer of faulthandler, which does not need the interpreter lock, writes the stacks and ends the rank.
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
# Upper bound for a single operation that cannot report progress, such as one collective or one flush of a file.
STALL_SECONDS = 3600.0
GRACE_SECONDS = 60.0  # from the stack to the end of the process: the ranks notice a stall some seconds apart
REPEAT_SECONDS = 10.0  # a repeated signal within this time is the same request
GUARD_SECONDS = 10.0  # between two checks of the progress of all ranks


class Watch:
    """Watches one rank from `begin` to `end`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        stall_seconds: float,
        grace_seconds: float = GRACE_SECONDS,
        repeat_seconds: float = REPEAT_SECONDS,
    ):
        """Create the watch before any rank calls `begin`, so that all ranks know which folders do not exist yet.

        Args:
            folder: of the run, shared by all ranks.
            stall_seconds: time without progress on any rank after which the run counts as stalled.
            grace_seconds: from the stall to the end of the rank.
            repeat_seconds: after the first signal, during which another one is the same request.
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
        self._moved_at = 0  # modification time of the file when this rank last read it
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True, name="watch")
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def begin(self) -> None:
        """Start to watch the progress of all ranks. Signals are handled only after `heed_signals`."""
        with suppress(OSError):  # other code reports problems of the run folder
            self._stack_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stack_file = self._stack_path.open("a")  # keeps the stacks of an earlier hang
        except OSError:
            self._stack_file = Path(os.devnull).open("a")  # noqa: SIM115
        self._thread.start()

    def heed_signals(self, launcher: Launcher | None = None) -> None:
        """Make signals and the death of the launcher request a graceful stop. Must be called in the main thread."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        if launcher is not None:
            launcher.on_death = self._on_death

    def beat(self) -> None:
        """Record progress of this rank. Any thread may call it."""
        self._beats += 1

    def end(self) -> None:
        """Stop watching. Removes its files, except the stacks of a hang, and empty folders."""
        if not self._thread.is_alive():  # `begin` was not called
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stack_file.close()
        with suppress(OSError):
            if self._stack_path.stat().st_size == 0:
                self._stack_path.unlink()
        with suppress(OSError):  # a rank that is still working creates it again
            self._moved_path.unlink()
        for place in (self._stack_path.parent, *self._missing):
            with suppress(OSError):  # not empty: it holds files of another rank or of the run
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
        """Write the stacks and end the process unless this is called again in time."""
        faulthandler.dump_traceback_later(self._stall_seconds + self._grace_seconds, exit=True, file=self._stack_file)

    def _any_rank_moved(self) -> bool:
        """Whether any rank has made progress since the last call. Publishes the progress of this rank."""
        beats, seen = self._beats, self._moved_at
        moved, self._beats_seen = beats != self._beats_seen, beats
        with suppress(OSError):  # if the disk is gone, the progress of this rank still counts
            # Opening makes a network disk refresh the time. O_NONBLOCK: a FIFO in its place must not block.
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
        with suppress(OSError):  # standard error may be closed
            print(
                f"nextune: rank {self._rank} on {socket.gethostname()}: no rank made progress for"
                f" {self._stall_seconds:g} s; the stacks of this one are in {self._stack_path}; it ends in"
                f" {self._grace_seconds:g} s unless the run goes on, and the same command continues from the newest"
                " checkpoint",
                file=sys.stderr,
                flush=True,
            )
