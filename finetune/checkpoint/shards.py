"""The safetensors files of a checkpoint folder: what they hold, and writing new ones. Knows no model.

Only headers are read to know what a folder holds, so opening 80 billion parameters takes a second or two.

Source: the safetensors format (8 bytes of length, a JSON header, the data); the index file of transformers.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
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
        """The values of one stored tensor, in its stored dtype."""
        with safe_open(self.folder / self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)


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
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not a safetensors file (unreadable header); download it again") from None
    expected = max((stored.end for stored in tensors.values()), default=data)
    if size != expected:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {expected}; download it again")
    return tensors


def _read_indexed(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(
            f"{index}: not an index of weights (no readable `weight_map`); download it again"
        ) from None
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        held = read_header(folder / file)
        tensors |= {name: stored for name, stored in held.items() if places.get(name) == file}
        unnamed = [name for name in held if name not in places]
        if unnamed:
            raise CheckpointError(f"{folder / file}: holds {listed(unnamed)}, which {INDEX} does not name")
    absent = [f"{name} (in {file})" for name, file in places.items() if name not in tensors]
    if absent:
        raise CheckpointError(f"{index}: names {listed(absent)}, which the files do not hold; download them again")
    return tensors


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
