"""Files copied with a hash of what was read, and read back from the disk to be compared with it."""

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

_CHUNK_BYTES = 16 << 20  # a multiple of the size of every number format


def copy_file(source: Path, target: Path) -> str:
    """Copy a file; gives the sha256 of what was read."""
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
    """Copy a safetensors file with the values of some tensors replaced; gives the sha256 of what was to be written.

    Args:
        value: what takes the place of a tensor, in the dtype that it is stored in; None copies it.
        not_finite: is called with the name of each copied tensor that holds infinite or undefined numbers.

    Raises:
        CheckpointError: the source is no longer as long as its header says.
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
    """Read files back from the disk and compare each with its hash, by path in the folder.

    Raises:
        CheckpointError: names those that differ.
    """
    wrong = [name for name, expected in hashes.items() if hash_on_disk(folder / name) != expected]
    if wrong:
        raise CheckpointError(f"{listed(wrong)}: not read back as written; check the disk, then export again")


def hash_on_disk(path: Path) -> str:
    """The sha256 of a file as the disk holds it: written out first, and not from the kernel's memory."""
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
    if not dtype.is_floating_point or dtype.itemsize < 2:  # integers; float8 is for whoever loads the base to judge
        return True
    return all_finite(torch.frombuffer(bytearray(chunk), dtype=dtype))
