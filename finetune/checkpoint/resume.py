"""Training state on disk, whole or absent: `ROOT/step-N/`, and `ROOT/latest` that names the newest.

Every rank writes the tensors it answers for to one file; the last act is a rename by rank 0, after the manifest with
the size and hash of every file is on the disk. A run killed at any moment leaves the previous checkpoints and at most a
`step-N.tmp`, which the next write removes. Tensors are found by name, whichever rank wrote them, so a run may go on
with another number of ranks; the names are the trainer's (`PARAMETER::KIND`, for routed experts
`PARAMETER::KIND::EXPERT`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint.folder import sync, write_json
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import listed, read_header

_MANIFEST = "manifest.json"
_LATEST = "latest"
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-\d+(\.old)?\.tmp")


class TensorStore(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, over the files of all ranks; each is read when asked for."""

    def __init__(self, folder: Path, files: list[str]):
        self._folder = folder
        self._opened = [safe_open(folder / file, "pt") for file in files]
        self._places = {name: place for place, file in enumerate(self._opened) for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self._places:
            raise CheckpointError(
                f"{self._folder}: holds no {name}; it comes from a run that trained other parameters, so give this run "
                "another name or the recipe of that one"
            )
        return self[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[self._places[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    rank: int,
    ranks: int,
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Write `ROOT/step-STEP` and make it the newest; called by every rank, with three barriers.

    A checkpoint of the same step is replaced. Older ones beyond `keep` are deleted, after the new one is whole.

    Args:
        tensors: what this rank answers for, on any device; no name may come from two ranks.
        state: anything JSON can hold; rank 0's is kept.
        barrier: returns when every rank has called it.
        keep: how many checkpoints stay, this one included; at least 1.

    Raises:
        CheckpointError: the disk refused, or a rank's part did not arrive.
    """
    assert keep >= 1, "the checkpoint just written cannot be deleted"
    final, partial = root / f"step-{step}", root / f"step-{step}.tmp"
    described = json.dumps(state) if rank == 0 else ""
    try:
        if rank == 0:
            _clear(root)
            partial.mkdir(parents=True)
        barrier()
        _write_part(partial, rank, tensors)
        barrier()
        if rank == 0:
            _commit(partial, final, step, ranks, described)
            _prune(root, step, keep)
        barrier()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: rank {rank} could not write it ({error}); the checkpoints before it are whole"
        ) from error
    return final


def newest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one sentence for each newer one that had to be passed over.

    Reads every byte of it, to compare hashes: call it on one rank and tell the others.
    """
    told = []
    if not root.is_dir():
        return None, []
    for folder in sorted(root.iterdir(), key=_step_of, reverse=True):
        if _LEFTOVER.fullmatch(folder.name):
            told.append(f"{folder}: passed over, the run stopped while it was being written or deleted")
        elif _STEP.fullmatch(folder.name) and folder.is_dir():
            fault = _fault(folder)
            if fault is None:
                return folder, told
            told.append(f"{folder}: passed over, {fault}")
    return None, told


def open_state(folder: Path) -> tuple[dict[str, Any], TensorStore]:
    """The state (and in it `step`) and the tensors of a checkpoint that `newest_checkpoint` found whole.

    Raises:
        CheckpointError: the manifest or a file is missing, changed or cut short.
    """
    manifest = _read_manifest(folder)
    files = [part["file"] for part in manifest["parts"]]
    for file in files:
        read_header(folder / file)
    return {**manifest["state"], "step": manifest["step"]}, TensorStore(folder, files)


def _write_part(partial: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    if not partial.is_dir():
        raise CheckpointError(f"{partial}: rank {rank} does not see it; output.dir must be on a disk all ranks share")
    path = partial / f"part-{rank:05d}.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    part = {"file": path.name, "bytes": path.stat().st_size, "sha256": _hash(path), "tensors": len(tensors)}
    write_json(path.with_suffix(".json"), part)


def _commit(partial: Path, final: Path, step: int, ranks: int, described: str) -> None:
    parts = []
    owners: dict[str, str] = {}
    for rank in range(ranks):
        description = partial / f"part-{rank:05d}.json"
        if not description.exists():
            raise CheckpointError(
                f"{partial}: holds no part of rank {rank}; output.dir must be on a disk all ranks share"
            )
        part = json.loads(description.read_text(encoding="utf-8"))
        names = read_header(partial / part["file"]).keys()
        twice = [f"{name} (also in {owners[name]})" for name in names if name in owners]
        assert not twice, f"{part['file']}: holds tensors of another rank: {listed(twice)}"
        owners |= dict.fromkeys(names, part["file"])
        parts.append(part)
    manifest = {"step": step, "ranks": ranks, "parts": parts, "state": json.loads(described)}
    write_json(partial / _MANIFEST, {**manifest, "sha256": _hash_of_values(manifest)})
    sync(partial)
    if final.exists():
        _delete(final)
    os.rename(partial, final)
    sync(final.parent)
    pointer = final.parent / _LATEST
    beside = pointer.with_suffix(".tmp")
    beside.write_text(final.name + "\n", encoding="utf-8")
    sync(beside)
    os.replace(beside, pointer)
    sync(pointer.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    older = sorted(
        (path for path in root.iterdir() if _STEP.fullmatch(path.name) and _step_of(path) < step), key=_step_of
    )
    for folder in older[: max(0, len(older) + 1 - keep)]:
        _delete(folder)


def _delete(folder: Path) -> None:
    # Renamed first, so that one deleted halfway is not taken for a checkpoint.
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _clear(root: Path) -> None:
    for path in root.glob("step-*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _step_of(folder: Path) -> int:
    found = _STEP.match(folder.name)
    return int(found[1]) if found else -1


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there and has the hash that was recorded."""
    try:
        manifest = _read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for part in manifest["parts"]:
        path = folder / part["file"]
        if not path.exists():
            return f"{path.name} is missing"
        if path.stat().st_size != part["bytes"]:
            return f"{path.name} is {path.stat().st_size} bytes instead of {part['bytes']}"
        if _hash(path) != part["sha256"]:
            return f"{path.name} was changed after it was written (its hash differs)"
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; this is not a checkpoint of a run") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: not a manifest of a checkpoint; it was changed or cut short") from None
    if recorded != _hash_of_values(manifest):
        raise CheckpointError(f"{path}: was changed after it was written (its hash differs)")
    return manifest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_values(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
