"""Atomic replacement of files, and the error for an unreadable file of a run folder."""

import os
from pathlib import Path


class MonitoringError(ValueError):
    """A file of a run folder that cannot be read; the message says which, what is wrong and what to do."""


def replace_file(path: Path, contents: bytes) -> None:
    """Replace `path` atomically: a reader, or a crash, sees the old file or the new one.

    A process killed meanwhile leaves `path.tmp`, which the next write overwrites. Only one process may write a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
