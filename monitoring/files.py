"""Atomic replacement and hashing of files, and the error for an unreadable file of a run folder."""

import hashlib
import os
from collections.abc import Callable
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


def sha256_of(path: Path, progress: Callable[[], None] = lambda: None, piece_bytes: int = 16 << 20) -> str:
    """The sha256 of a file, read in pieces.

    Args:
        progress: called after each piece.
    """
    digest, piece = hashlib.sha256(), bytearray(piece_bytes)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
            progress()
    return digest.hexdigest()
