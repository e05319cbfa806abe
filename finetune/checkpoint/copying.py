"""Copying of files with a hash of the source, and comparison of the copy on the disk with that hash."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from finetune.checkpoint.finite import all_finite
from finetune.checkpoint.folder import sync
from finetune.checkpoint.header import Stored
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import listed, read_header

_CHUNK_BYTES = 16 << 20  # a multiple of every dtype's size


def copy_file(source: Path, target: Path) -> str:
    """Copy a file and return the sha256 of the bytes read from `source`."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(_CHUNK_BYTES):
            digest.update(chunk)
            written.write(chunk)
    return digest.hexdigest()


def rewrite_file(
    source: Path, target: Path, value: Callable[[str, Stored], Tensor | None], not_finite: Callable[[str], None]
) -> str:
    """Copy a safetensors file with the values of some tensors replaced, and return the sha256 of the intended contents.

    Args:
        value: returns the new values of a tensor in its stored dtype, or None to copy it.
        not_finite: called with the name of each copied tensor that holds NaN or infinity.

    Raises:
        CheckpointError: the source is shorter than its header says.
    """
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:

        def write(chunk: bytes | memoryview) -> None:
            digest.update(chunk)
            written.write(chunk)

        tensors = read_header(source)
        header = next(iter(tensors.values())).start if tensors else source.stat().st_size
        for chunk in _range(read, source, 0, header):
            write(chunk)
        for name, stored in tensors.items():
            new = value(name, stored)
            if new is not None:
                content = new.contiguous().view(-1).view(torch.uint8).numpy().data
                assert len(content) == stored.end - stored.start, f"{name}: {len(content)} bytes take another's place"
                write(content)
                continue
            finite = True
            for chunk in _range(read, source, stored.start, stored.end):
                write(chunk)
                finite = finite and _is_finite(chunk, stored)
            if not finite:
                not_finite(name)
    return digest.hexdigest()


def check_written(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read files back from the disk and compare them with their hashes.

    Args:
        hashes: expected sha256 by path relative to `folder`.

    Raises:
        CheckpointError: names the files that differ.
    """
    wrong = [name for name, expected in hashes.items() if hash_on_disk(folder / name) != expected]
    if wrong:
        raise CheckpointError(f"{listed(wrong)}: not read back as written; check the disk, then export again")


def hash_on_disk(path: Path) -> str:
    """The sha256 of a file as stored on the disk: it is flushed, then read without the page cache."""
    sync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _range(file: BinaryIO, path: Path, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        chunk = file.read(min(_CHUNK_BYTES, end - start))
        if not chunk:
            raise CheckpointError(f"{path}: ends at byte {start}, in the middle of a tensor; restore the file")
        yield chunk
        start += len(chunk)


def _is_finite(chunk: bytes, stored: Stored) -> bool:
    dtype = stored.torch_dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:  # float8 is left to the loader of the base
        return True
    return all_finite(torch.frombuffer(bytearray(chunk), dtype=dtype))
