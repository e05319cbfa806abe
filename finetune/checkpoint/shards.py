"""The safetensors files of a checkpoint folder: what they hold, reading from them, new ones. Knows no model.

Only headers are read to know what a folder holds, so opening 80 billion parameters takes a second or two.

Values are read, not mapped. Mapped pages count as memory of the process until the file is closed, the kernel reads far
around each one (for a quarter of the experts, more than twice their bytes), and a file that is cut short meanwhile
kills the process with a signal, where a read only returns less than it was asked for.

Source: the safetensors format (8 bytes of length, a JSON header, the data); the index file of transformers.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint.folder import write_json
from finetune.checkpoint.layout import CheckpointError, Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
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

_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit

STAGING_BYTES = 32 << 20  # host memory through which values pass that cannot be read straight into their place
_MOST_PIECES = 64  # in one read; Linux takes up to 1024
_ALIGNMENT_BYTES = 8  # of each value in the staging memory: that of the widest dtype


class Stored(NamedTuple):
    """One stored tensor: the file that holds it, and where in that file."""

    file: str
    dtype: str  # in the format's spelling: BF16, F32
    shape: Shape
    start: int  # first byte in the file
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch calls it.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file}: holds tensors of dtype {self.dtype}; known: {', '.join(_DTYPES)}")
        return _DTYPES[self.dtype]


class Checkpoint(NamedTuple):
    """The tensors of a folder, by name, in the order of files and bytes; values are read when asked for."""

    folder: Path
    tensors: dict[str, Stored]

    def by_file(self) -> dict[str, list[str]]:
        """Names of the tensors in each file."""
        names: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            names.setdefault(stored.file, []).append(name)
        return names

    def read(self, name: str) -> Tensor:
        """The values of one stored tensor, in its stored dtype.

        Raises:
            CheckpointError: the file cannot be read.
        """
        stored = self.tensors[name]
        values = torch.empty(stored.shape, dtype=stored.torch_dtype)
        read_into(self.folder / stored.file, [Wanted(stored.start, stored.torch_dtype, values)])
        return values


class Wanted(NamedTuple):
    """Numbers that stand one after another in a file, and the tensor that takes them."""

    start: int  # first byte in the file
    dtype: torch.dtype  # as stored
    into: Tensor  # contiguous; of any dtype, on any device

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.into.numel() * self.dtype.itemsize

    @property
    def direct(self) -> bool:
        """Whether the bytes in the file are those of the tensor, in memory that a file can be read into."""
        return self.into.device.type == "cpu" and self.into.dtype == self.dtype


class Entry(NamedTuple):
    """A tensor to be written."""

    dtype: torch.dtype
    shape: Shape

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored values."""
        return self.numbers * self.dtype.itemsize


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights in the released form; a folder to train from scratch holds none."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder holds: `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: no weights, an unreadable or truncated file, or an index that does not fit its files.
    """
    if (folder / SINGLE).exists():
        return Checkpoint(folder, read_header(folder / SINGLE))
    if (folder / INDEX).exists():
        return Checkpoint(folder, _read_indexed(folder))
    others = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {others[0]}, another format; convert it to safetensors" if others else "neither; is it a checkpoint?"
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}")


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: no such file, not safetensors, or not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LARGEST_HEADER_BYTES)))
        header.pop("__metadata__", None)
        data = 8 + length
        tensors = {
            name: Stored(path.name, at["dtype"], tuple(at["shape"]), *(data + place for place in at["data_offsets"]))
            for name, at in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        expected = _end_of(tensors, data)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({error.strerror}); check the file and its disk") from error
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a safetensors file (unreadable header); download it again") from None
    if expected is None:
        raise CheckpointError(f"{path}: its header does not say where its tensors are; download it again")
    if size != expected:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {expected}; download it again")
    return tensors


def _end_of(tensors: Mapping[str, Stored], data: int) -> int | None:
    """The byte after the last tensor; None if they leave gaps, overlap, or are not as long as dtype and shape say."""
    end = data
    for stored in tensors.values():
        size = stored.end - stored.start
        if stored.dtype in _DTYPES and size != math.prod(stored.shape) * _DTYPES[stored.dtype].itemsize:
            return None
        if stored.start != end or size < 0:
            return None
        end = stored.end
    return end


def _read_indexed(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        gone = [file for file in files if not (folder / file).exists()]
    except OSError as error:
        raise CheckpointError(f"{index}: could not be read ({error.strerror}); check the file and its disk") from error
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{index}: not an index of weights (no readable `weight_map`); download it again"
        ) from None
    if gone:
        others = f", nor are {len(gone) - 1} others that it names" if len(gone) > 1 else ""
        raise CheckpointError(
            f"{folder / gone[0]}: no such file, but {INDEX} names it{others}; download the checkpoint again"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        held = read_header(folder / file)
        tensors |= {name: stored for name, stored in held.items() if places.get(name) == file}
        unnamed = [name for name in held if name not in places]
        if unnamed:
            raise CheckpointError(f"{folder / file}: holds {listed(unnamed)}, which {INDEX} does not name")
    absent = [f"{name} (in {file})" for name, file in places.items() if name not in tensors]
    if absent:
        raise CheckpointError(f"{index}: names {listed(absent)}, which the files do not hold; download them again")
    return tensors


def read_into(path: Path, wanted: Iterable[Wanted]) -> None:
    """Fill tensors with values of one file, in few reads if they are wanted in the order of their bytes.

    Straight into place where `Wanted.direct`. All else passes through `STAGING_BYTES` of host memory (page-locked for a
    GPU), which is all that this takes beside the tensors.

    Raises:
        CheckpointError: no such file, it ends too early, or the disk refused.
    """
    staging = torch.empty(0, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            for run in _runs(wanted):
                staged = [piece for piece in run if not piece.direct]
                if staged and not len(staging):
                    on_gpu = staged[0].into.device.type == "cuda"
                    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
                buffers = _buffers(run, staging)
                _read(file.fileno(), [buffer.numpy().data for buffer in buffers], run[0].start)
                for piece, buffer in zip(run, buffers, strict=True):
                    if not piece.direct:
                        piece.into.copy_(buffer.view(piece.dtype))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from None
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({error.strerror}); check the file and its disk") from error


def _runs(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Lists of pieces that follow one another in the file without a gap; their staged ones fit the staging memory."""
    run: list[Wanted] = []
    staged_bytes = end = 0
    for piece in (piece for one in wanted for piece in _pieces(one)):
        size = 0 if piece.direct else _aligned(piece.size_bytes)
        if run and (piece.start != end or len(run) == _MOST_PIECES or staged_bytes + size > STAGING_BYTES):
            yield run
            run, staged_bytes = [], 0
        run.append(piece)
        staged_bytes += size
        end = piece.start + piece.size_bytes
    if run:
        yield run


def _pieces(one: Wanted) -> Iterator[Wanted]:
    """The same, flat, and cut where the staging memory is too small for it."""
    assert one.into.is_contiguous(), "only a tensor in one piece can be filled with one range of a file"
    flat = one.into.detach().view(-1)
    if one.direct:
        yield one._replace(into=flat)
        return
    numbers = STAGING_BYTES // one.dtype.itemsize
    for first in range(0, len(flat), numbers):
        yield Wanted(one.start + first * one.dtype.itemsize, one.dtype, flat[first : first + numbers])


def _buffers(run: list[Wanted], staging: Tensor) -> list[Tensor]:
    """The bytes that each piece is read into: its own, or the next ones of the staging memory."""
    buffers = []
    for piece in run:
        if piece.direct:
            buffers.append(piece.into.view(torch.uint8))
        else:
            buffers.append(staging[: piece.size_bytes])
            staging = staging[_aligned(piece.size_bytes) :]
    return buffers


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _read(descriptor: int, buffers: list[memoryview], start: int) -> None:
    """Fill all buffers, in order, with the bytes from `start` on; one read may return less than it was asked for."""
    buffers = [buffer for buffer in buffers if len(buffer)]
    while buffers:
        count = os.preadv(descriptor, buffers, start)
        if count == 0:
            raise EOFError(f"ends at byte {start}, in the middle of a tensor")
        start += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]


def write_shards(
    folder: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor], max_shard_bytes: float
) -> None:
    """Write tensors as `model.safetensors`, or as numbered files and their index when one file is not enough.

    Holds one file's tensors in memory at a time.

    Args:
        read: the values of a tensor by name; shape and dtype as its entry says.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.size_bytes
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).contiguous() for name in names}
        for name, tensor in tensors.items():
            entry = entries[name]
            assert (tensor.dtype, tuple(tensor.shape)) == entry, f"{name}: {tensor.dtype} {tensor.shape}, not {entry}"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        numbers = sum(entry.numbers for entry in entries.values())
        size = sum(entry.size_bytes for entry in entries.values())
        metadata = {"total_parameters": numbers, "total_size": size}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def listed(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
