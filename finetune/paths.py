"""Paths that a user wrote: what no file can be called, and where the rest leads."""

import os
from pathlib import Path

LONGEST_PATH = 4096 - 1  # PATH_MAX and NAME_MAX of Linux, in bytes
LONGEST_PART = 255
ROOM_IN_RUN = 200  # for what is put into a run folder: checkpoints/step-N.TOKEN.tmp/NAME.safetensors


def path_problem(text: str, room: int = 0) -> str | None:
    """Why no file can have this path, or None.

    Args:
        room: bytes to leave for names of files inside it.
    """
    if not text:
        return "is empty"
    try:
        name = os.fsencode(text)
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    if b"\0" in name:
        return "holds a NUL character, which no path can"
    longest = max(len(part) for part in name.split(b"/"))
    if longest > LONGEST_PART:
        return f"holds a name of {longest} bytes, but a file's may have {LONGEST_PART}"
    if len(name) + room > LONGEST_PATH:
        return f"has {len(name)} bytes, but a path may have {LONGEST_PATH - room} here"
    return None


def expanded(text: str) -> Path:
    """The path, with `~` as the user's home where there is one."""
    return Path(os.path.expanduser(text))
