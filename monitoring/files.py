"""Whole files or none: the one way a file is replaced anywhere, and the error for a file that cannot be read back."""

import os
from pathlib import Path


class MonitoringError(ValueError):
    """A file of a run folder that cannot be read back: says which file, what is wrong with it and what to do."""


def replace_file(path: Path, contents: bytes) -> None:
    """Put `contents` at `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    A process that is killed in between leaves `path.tmp`, which the next write replaces. One process writes a file.
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
