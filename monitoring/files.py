"""Whole files or none: the one way this package replaces a file, and the error for a file it cannot read."""

import os
from pathlib import Path


class MonitoringError(ValueError):
    """A file of a run folder that cannot be read back: says which file, what is wrong with it and what to do."""


def replace_file(path: Path, contents: bytes) -> None:
    """Put `contents` at `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
