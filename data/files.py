"""Our own files, which are verified when read: hashed in pieces, replaced atomically."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_JSON_BYTES = 64 << 20  # of our own JSON files, which are far smaller


class FaultError(ValueError):
    """A file of ours that is damaged or modified; the message names it and what is wrong."""


def bytes_of(path: Path) -> int:
    """The size of a regular file in bytes.

    Raises:
        FaultError: no such file, or not a regular file, such as a FIFO, which would block when opened.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FaultError(f"{path}: is missing") from None
    except OSError as error:
        raise FaultError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise FaultError(f"{path}: is not a file")
    return found.st_size


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` atomically, with a hash of their own, and flush them to the disk."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        file.write(json.dumps({**values, "values_sha256": _hash_of(values)}, indent=2).encode() + b"\n")
        flush(file)
    beside.replace(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The values that `write_json` wrote.

    Raises:
        FaultError: the file is missing, cannot be read, or was modified.
    """
    if bytes_of(path) > MOST_JSON_BYTES:
        raise FaultError(f"{path}: is too large to be a file of ours")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recorded = values.pop("values_sha256")
        if recorded == _hash_of(values):
            assert isinstance(values, dict), "nothing else has a pop of a name"
            return values
    except OSError as error:
        raise FaultError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):  # ValueError: not UTF-8, not JSON
        raise FaultError(f"{path}: is not a file of ours") from None
    raise FaultError(f"{path}: was changed after it was written")


def flush(file: BinaryIO) -> None:
    """Flush a file's contents to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
