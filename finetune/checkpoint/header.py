"""Parsing of safetensors headers and weight indexes, which are untrusted input and validated completely.

The tensors of a file must be contiguous, and an index may only name files inside its folder. A symbolic link may leave
the folder, as in a hub cache; a path in the index may not.

Source: the safetensors format (8 bytes of length, a JSON header, the data); the index file of transformers.
"""

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import torch

from finetune.checkpoint.layout import CheckpointError, Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MOST_DIMENSIONS = 16
_LONGEST_NAME = 500  # characters of a tensor's name


class HeaderError(ValueError):
    """An invalid header or index; the message is part of a sentence."""


class Stored(NamedTuple):
    """One stored tensor: its file and its byte range in that file."""

    file: str  # relative to the folder, as in the index
    dtype: str  # in the format's notation: BF16, F32
    shape: Shape
    start: int  # first byte in the file
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The corresponding torch dtype.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file}: holds tensors of dtype {self.dtype}; known: {', '.join(DTYPES)}")
        return DTYPES[self.dtype]


def parse_header(header: Any, file: str, data: int) -> tuple[dict[str, Stored], int]:
    """The tensors of a file in the order of their bytes, and the end offset of the last one.

    Args:
        file: value of `Stored.file`.
        data: offset of the first byte after the header.

    Raises:
        HeaderError: a wrong type, or tensors that leave gaps, overlap, or whose size contradicts dtype and shape.
    """
    if not isinstance(header, dict):
        raise HeaderError("its header is not an object")
    header.pop("__metadata__", None)
    stored = [(name, _stored(name, at, file, data)) for name, at in header.items()]
    tensors = dict(sorted(stored, key=lambda item: (item[1].start, item[1].end)))
    return tensors, _end_of(tensors, data)


def _stored(name: str, at: Any, file: str, data: int) -> Stored:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise HeaderError(f"a tensor has the name {name[:40]!r}")
    if not isinstance(at, dict):
        raise HeaderError(f"{name} is not described by an object")
    dtype, shape, offsets = at.get("dtype"), at.get("shape"), at.get("data_offsets")
    if not isinstance(dtype, str) or not dtype.isprintable() or len(dtype) > 20:
        raise HeaderError(f"{name} has no dtype")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise HeaderError(f"{name} has no shape of whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"{name} has no two offsets")
    return Stored(file, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _end_of(tensors: Mapping[str, Stored], data: int) -> int:
    end = data
    for name, stored in tensors.items():
        size = stored.end - stored.start
        if stored.start != end or size < 0:
            raise HeaderError(f"{name} does not begin where the tensor before it ends")
        if stored.dtype in DTYPES and size != math.prod(stored.shape) * DTYPES[stored.dtype].itemsize:
            raise HeaderError(f"{name} is {size} bytes, which is not {list(stored.shape)} of {stored.dtype}")
        end = stored.end
    return end


def parse_index(index: Any) -> dict[str, str]:
    """The file of every tensor, relative to the folder of the index.

    Raises:
        HeaderError: a wrong type, or a path that leaves the folder.
    """
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise HeaderError("no readable `weight_map`")
    for name, file in places.items():
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise HeaderError(f"a tensor has the name {name[:40]!r}")
        inside = PurePosixPath(file)
        leaves = inside.is_absolute() or ".." in inside.parts
        if leaves or not inside.parts or str(inside) != file or not file.isprintable():
            raise HeaderError(
                f"it says that {name} is in {file[:200]!r}, but only files inside the folder are read, named as"
                " FILE.safetensors or FOLDER/FILE.safetensors"
            )
    return places
