"""Writing and hashing one rank's file of a checkpoint in pieces, so that a long write reports progress.

Source: the safetensors format (8 bytes of length, a JSON header, the data).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from finetune.checkpoint.folder import sync
from finetune.checkpoint.header import DTYPES
from monitoring.files import sha256_of

PIECE_BYTES = 64 << 20
PIECES_BETWEEN_FLUSHES = 16  # a single flush at the end could exceed the stall timeout
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT_BYTES = 8


def write_part(path: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None]) -> tuple[int, str]:
    """Write tensors in host memory as one safetensors file and flush it to the disk.

    Args:
        progress: called after each piece.

    Returns:
        The size of the file in bytes and its sha256.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for number, piece in enumerate(_pieces(tensors), start=1):
            written = 0
            while written < len(piece):  # a write may be partial
                written += file.write(piece[written:])
            digest.update(piece)
            size += len(piece)
            if number % PIECES_BETWEEN_FLUSHES == 0:
                os.fdatasync(file.fileno())
            progress()
    sync(path)
    progress()
    return size, digest.hexdigest()


def hash_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file.

    Args:
        progress: called after each piece.
    """
    return sha256_of(path, progress, PIECE_BYTES)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file in order: the header, then tensors by decreasing dtype size, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        described = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**described, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        values = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(values), PIECE_BYTES):
            yield values[start : start + PIECE_BYTES]
