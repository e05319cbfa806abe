"""Checks and resolution of paths in recipes."""

import glob
import os
import re
from pathlib import Path

from monitoring.file_search import SearchError, matches

CHECKOUT = Path(__file__).resolve().parents[2]

LONGEST_PATH = 4096 - 1  # PATH_MAX and NAME_MAX of Linux, in bytes
LONGEST_PART = 255
ROOM_IN_RUN = 200  # for names inside a run folder: checkpoints/step-N.TOKEN.tmp/NAME.safetensors


def path_problem(text: str, room: int = 0) -> str | None:
    """Why a path is invalid on Linux, or None.

    Args:
        room: bytes to reserve for names of files below it.
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
    """The path with `~` replaced by the user's home, if known."""
    return Path(os.path.expanduser(text))


def resolve(path: str, root: Path = CHECKOUT) -> Path | None:
    """The existing file, folder or glob for `path`, relative to the current folder, else to `root`; None if missing."""
    if path_problem(path) is not None:
        return None
    given = expanded(path)
    for place in (Path.cwd() / given, root / given):
        try:
            if os.path.exists(place) or (glob.has_magic(path) and any(matches(str(place)))):
                return Path(os.path.normpath(place))
        except SearchError:  # too many files to search; the reader of the path reports it
            return Path(os.path.normpath(place))
    return None


def is_hub_id(path: str, root: Path = CHECKOUT) -> bool:
    """Whether `path`, which does not exist here, has the form owner/name of the hub rather than of a folder."""
    owner, slash, name = path.partition("/")
    words = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
    return bool(slash and words.fullmatch(owner) and words.fullmatch(name)) and resolve(owner, root) is None
