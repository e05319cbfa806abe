"""How a command fails: a user's mistake is reported in one sentence; a bug keeps its traceback."""

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

# DeepSpeed's launcher ends all ranks when one ends, so other ranks must not exit before rank 0 has printed the error.
SECONDS_TO_SPEAK = 60
LONGEST_LINE = 2_000  # characters of a message
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "accelerate", "safetensors", "numpy")


class LostRankError(ValueError):
    """Another rank ended or hangs while this rank needs it. Every rank that notices reports it."""


def is_told(error: BaseException) -> bool:
    """Whether the error is one of this project's, whose message is sufficient. Others are bugs and keep a traceback."""
    return isinstance(error, ValueError) and type(error).__module__.startswith(("finetune.", "data.", "monitoring."))


def readable(error: BaseException) -> str:
    """The message of an error, made safe for a terminal, because it may quote an untrusted file.

    Control characters are escaped, and at most `LONGEST_LINE` characters of a line are shown.
    """
    lines = []
    for line in str(error).split("\n"):
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LONGEST_LINE])
        lines.append(shown if len(line) <= LONGEST_LINE else f"{shown}... ({len(line):,} characters)")
    return "\n".join(lines)


def tell(error: ValueError) -> None:
    """Print an error that all ranks raised, once, on rank 0. Other ranks wait `SECONDS_TO_SPEAK` before they return."""
    if os.environ.get("RANK", "0") == "0":
        print(f"nextune: {readable(error)}", file=sys.stderr, flush=True)
    elif isinstance(error, LostRankError):  # rank 0 may be the lost rank
        print(
            f"nextune: rank {os.environ['RANK']} on {socket.gethostname()}: {readable(error)}",
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(SECONDS_TO_SPEAK)


@contextmanager
def told_by_every_host() -> Iterator[None]:
    """Report a user's mistake inside the block on the first rank of each host, not only on rank 0.

    For use before the ranks have joined. The cause may exist on one host only, such as a missing file.
    """
    try:
        yield
    except ValueError as error:
        if is_told(error) and os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0":
            print(f"nextune: {socket.gethostname()}: {readable(error)}", file=sys.stderr, flush=True)
        raise


def write_any_text() -> None:
    """Escape characters that the encoding of standard output cannot represent, instead of raising an error.

    Paths and charts may contain such characters.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    After a failure it skips the interpreter's cleanup: threads of process groups and libraries sometimes make the
    cleanup abort with another exit code and message.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def record_crash(folder: Path, error: Exception, *, rank: int, step: int | None) -> None:
    """Write `crash/rankR.json` into a run folder: the exception, host, step and versions of the libraries.

    A failure to write is ignored, so that it does not hide the original error.

    Args:
        step: the current optimizer step; None before the first.
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
