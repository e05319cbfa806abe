"""Reading and writing the safetensors files of a checkpoint folder; independent of any model.

Only headers are read to list the tensors of a folder, so opening a checkpoint of 80 billion parameters takes a second
or two.

Values are read, not mapped. Mapped pages count as memory of the process until the file is closed; the kernel reads
ahead around each one (for a quarter of the experts, more than twice their bytes); and truncation of a mapped file
kills the process with SIGBUS, whereas a read returns fewer bytes.

Source: the safetensors format (8 bytes of length, a JSON header, the data); the index file of transformers.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from finetune.checkpoint.folder import save_tensors, write_json
from finetune.checkpoint.header import HeaderError, Stored, parse_header, parse_index
from finetune.checkpoint.layout import CheckpointError, Shape
from monitoring.json_file import FileError, MissingFileError, open_regular, parse_json, read_json, reason

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit

STAGING_BYTES = 32 << 20  # host memory for values that cannot be read directly into their tensor
_MOST_PIECES = 64  # buffers in one `preadv`; Linux allows 1024
_ALIGNMENT_BYTES = 8  # of each value in the staging memory: the size of the widest dtype


class Checkpoint(NamedTuple):
    """The tensors of a folder by name, in the order of files and bytes; values are read on demand."""

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
    """A contiguous range of stored values, and the tensor to read them into."""

    start: int  # first byte in the file
    dtype: torch.dtype  # as stored
    into: Tensor  # contiguous; of any dtype, on any device

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.into.numel() * self.dtype.itemsize

    @property
    def direct(self) -> bool:
        """Whether the bytes can be read directly into the tensor: it is on the CPU and has the stored dtype."""
        return self.into.device.type == "cpu" and self.into.dtype == self.dtype


class Entry(NamedTuple):
    """A tensor to be written."""

    dtype: torch.dtype
    shape: Shape

    @property
    def numbers(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored values."""
        return self.numbers * self.dtype.itemsize


def has_weights(folder: str | Path) -> bool:
    """Whether the folder holds weights in the released layout; a folder for training from scratch has none."""
    folder = Path(folder)
    return os.path.lexists(folder / SINGLE) or os.path.lexists(folder / INDEX)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder: `model.safetensors`, or the files named by `model.safetensors.index.json`.

    Raises:
        CheckpointError: no weights, an unreadable or truncated file, or an index that contradicts its files.
    """
    folder = Path(folder)
    if os.path.lexists(folder / SINGLE):
        return Checkpoint(folder, read_header(folder / SINGLE))
    if os.path.lexists(folder / INDEX):
        return Checkpoint(folder, _read_indexed(folder))
    others = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {others[0]}, another format; convert it to safetensors" if others else "neither; is it a checkpoint?"
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}")


def read_header(path: Path, file: str | None = None, advice: str = "download it again") -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their bytes.

    Args:
        file: value of `Stored.file`; by default the file's name without its folder.
        advice: end of the message about a missing or damaged file.

    Raises:
        CheckpointError: no such file, not safetensors, or a size that contradicts its header.
    """
    try:
        with open_regular(path) as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(_take(opened, 8), "little")
            if length > min(_LARGEST_HEADER_BYTES, size - 8):
                raise HeaderError(f"its first bytes promise a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(_take(opened, length), "header", unique_keys=True)
        tensors, expected = parse_header(header, file or path.name, 8 + length)
    except MissingFileError:
        raise CheckpointError(f"{path}: no such file; {advice}") from None
    except HeaderError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); {advice}") from None
    except FileError as error:
        if not str(error).startswith("header:"):
            raise CheckpointError(f"{error}; check the file and its disk") from None
        raise CheckpointError(f"{path}: not a safetensors file ({error}); {advice}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({reason(error)}); check the file and its disk") from error
    if size != expected:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {expected}; {advice}")
    return tensors


def _take(file: IO[bytes], count: int) -> bytes:
    contents = b""
    while len(contents) < count:
        block = file.read(count - len(contents))
        if not block:
            raise HeaderError(f"it ends after {len(contents)} of {count} bytes")
        contents += block
    return contents


def _read_indexed(folder: Path) -> dict[str, Stored]:
    try:
        places = parse_index(read_json(folder / INDEX))
    except FileError as error:
        raise CheckpointError(f"{error}; an index of weights is expected, download it again") from None
    except HeaderError as error:
        raise CheckpointError(f"{folder / INDEX}: not an index of weights ({error}); download it again") from None
    files = sorted(set(places.values()))
    gone = [file for file in files if not os.path.exists(folder / file)]
    if gone:
        others = f", nor are {len(gone) - 1} others that it names" if len(gone) > 1 else ""
        raise CheckpointError(
            f"{folder / gone[0]}: no such file, but {INDEX} names it{others}; download the checkpoint again"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        held = read_header(folder / file, file)
        unnamed = [name for name in held if name not in places]
        if unnamed:
            raise CheckpointError(f"{folder / file}: holds {listed(unnamed)}, which {INDEX} does not name")
        elsewhere = [f"{name} (in {places[name]})" for name in held if places[name] != file]
        if elsewhere:
            raise CheckpointError(
                f"{folder / file}: holds {listed(elsewhere)}, for which {INDEX} names another file; readers differ in"
                " which one they take, so remove one of the two"
            )
        tensors |= held
    absent = [f"{name} (in {file})" for name, file in places.items() if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX}: names {listed(absent)}, which the files do not hold; download them again"
        )
    return tensors


def read_into(
    path: Path,
    wanted: Iterable[Wanted],
    progress: Callable[[], None] = lambda: None,
    advice: str = "download it again",
) -> None:
    """Fill tensors with values of one file; ranges that follow one another in the file are read together.

    Values are read directly into tensors where `Wanted.direct`. All others pass through `STAGING_BYTES` of host memory
    (page-locked for a GPU), which is the only additional memory.

    Args:
        wanted: ranges and their tensors, in the order of the file for few reads.
        progress: called after each read.
        advice: end of the message about a missing or truncated file.

    Raises:
        CheckpointError: no such file, it ends too early, or an I/O error.
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
                _read(file.fileno(), [buffer.numpy().data for buffer in buffers], run[0].start, progress)
                for piece, buffer in zip(run, buffers, strict=True):
                    if not piece.direct:
                        piece.into.copy_(buffer.view(piece.dtype))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {advice}") from None
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}; {advice}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({error.strerror}); check the file and its disk") from error


def _runs(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Group pieces into lists that are contiguous in the file and whose staged pieces fit into the staging memory."""
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
    """The range as flat tensors, split where it exceeds the staging memory."""
    assert one.into.is_contiguous(), "only a tensor in one piece can be filled with one range of a file"
    flat = one.into.detach().view(-1)
    if one.direct:
        yield one._replace(into=flat)
        return
    numbers = STAGING_BYTES // one.dtype.itemsize
    for first in range(0, len(flat), numbers):
        yield Wanted(one.start + first * one.dtype.itemsize, one.dtype, flat[first : first + numbers])


def _buffers(run: list[Wanted], staging: Tensor) -> list[Tensor]:
    """The byte buffer for each piece: its own tensor, or the next part of the staging memory."""
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


def _read(descriptor: int, buffers: list[memoryview], start: int, progress: Callable[[], None]) -> None:
    """Fill all buffers, in order, with the bytes from `start`; a single `preadv` may return fewer."""
    buffers = [buffer for buffer in buffers if len(buffer)]
    while buffers:
        count = os.preadv(descriptor, buffers, start)
        if count == 0:
            raise EOFError(f"ends at byte {start}, in the middle of a tensor")
        start += count
        progress()
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]


def write_shards(
    folder: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor], max_shard_bytes: float
) -> None:
    """Write tensors as `model.safetensors`, or as numbered files with an index if they exceed `max_shard_bytes`.

    The tensors of one file are held in memory at a time.

    Args:
        read: returns the values of a tensor by name, with the shape and dtype of its entry.
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
        save_tensors(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        numbers = sum(entry.numbers for entry in entries.values())
        size = sum(entry.size_bytes for entry in entries.values())
        metadata = {"total_parameters": numbers, "total_size": size}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def listed(names: list[str]) -> str:
    """The first ten names, and the number of the others."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
