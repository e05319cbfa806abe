"""How a command fails: a mistake of the user is told in one sentence; what is our fault is kept with its traceback."""

import io
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from monitoring.files import replace_file

# DeepSpeed's launcher ends every rank as soon as one has ended; a rank that left before rank 0 spoke would silence it.
SECONDS_TO_SPEAK = 60
LONGEST_LINE = 2_000  # characters of a message
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "safetensors", "numpy")


class LostRankError(ValueError):
    """Another rank ended or hangs while this one needs it; each rank that notices says so itself."""


def is_told(error: BaseException) -> bool:
    """Whether this error is one of ours, whose message is the whole story; others are bugs and keep their traceback."""
    return isinstance(error, ValueError) and type(error).__module__.startswith(("finetune.", "data.", "monitoring."))


def readable(error: BaseException) -> str:
    """The message of an error as a terminal may show it: it can quote a file that somebody else wrote.

    Control characters are escaped, and a line is at most `LONGEST_LINE` characters long.
    """
    lines = []
    for line in str(error).split("\n"):
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST_LINE])
        lines.append(shown if len(line) <= LONGEST_LINE else f"{shown}... ({len(line):,} characters)")
    return "\n".join(lines)


def tell(error: ValueError) -> None:
    """Print, once, a mistake that every rank has found; returns on the other ranks when rank 0 has had time to."""
    if os.environ.get("RANK", "0") == "0":
        print(f"nextune: {readable(error)}", file=sys.stderr, flush=True)
    elif isinstance(error, LostRankError):  # rank 0 may be the one that is gone
        print(
            f"nextune: rank {os.environ['RANK']} on {socket.gethostname()}: {readable(error)}",
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(SECONDS_TO_SPEAK)


@contextmanager
def told_by_every_host() -> Iterator[None]:
    """Before the ranks have joined: a mistake found inside is told by the first rank of each host, not by rank 0 alone.

    It may be one that only this host has, such as a file that is missing there.
    """
    try:
        yield
    except ValueError as error:
        if is_told(error) and os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
            print(f"nextune: {socket.gethostname()}: {readable(error)}", file=sys.stderr, flush=True)
        raise


def write_any_text() -> None:
    """Let standard output take every character, as an escape where the terminal's encoding has none for it.

    A path of a user, or a bar of a chart, must not end a command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def leave(code: int) -> NoReturn:
    """End the process with this code.

    After a failure at once: threads that a process group or a library still runs make the interpreter's orderly end
    abort now and then, with a code and a message of its own in place of ours.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def record_crash(folder: Path, error: Exception, *, rank: int, step: int | None) -> None:
    """Write `crash/rankR.json` into a run folder: what ended this rank, where, at which step, with which libraries.

    A disk that refuses it is passed over, so that the error itself stays the last word.

    Args:
        step: the optimizer step that was being taken; None before the first.
    """
    facts = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "step": step,
        "exception": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}},
    }
    with suppress(OSError):
        replace_file(folder / "crash" / f"rank{rank}.json", (json.dumps(facts, indent=1) + "\n").encode())
