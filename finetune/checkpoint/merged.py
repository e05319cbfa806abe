"""Export of a run as a whole model that other tools load: the base with the trained tensors in place of its own.

Every file is read back from the disk before the folder is renamed to its final name. A trained tensor that does not
occur in the export is an error, and files of the base that are not exported are reported.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.checkpoint.copying import check_written, copy_file, hash_on_disk, rewrite_file
from finetune.checkpoint.folder import companions, is_companion, whole_folder
from finetune.checkpoint.header import Stored
from finetune.checkpoint.layout import CheckpointError, Slot, is_carried, stored_tensors
from finetune.checkpoint.mark import About, name_beside, write_about
from finetune.checkpoint.shards import (
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    has_weights,
    listed,
    open_checkpoint,
    read_header,
    write_shards,
)
from finetune.checkpoint.trained import LoraFactors, Trained, rounded
from finetune.checkpoint.weights import MAX_SHARD_BYTES, match
from finetune.model.config import ModelConfig


class Merged(NamedTuple):
    """The contents of a merged export."""

    changed: list[str]  # stored tensors that were trained
    copied: list[str]  # stored tensors copied from the base, including those of files that the index does not name
    others: list[str]  # files that are not weights, copied from the base
    left_out: list[str]  # files and folders of the base that were not exported
    not_finite: list[str]  # copied tensors that hold NaN or infinity in the base

    def sentence(self) -> str:
        """One sentence about what was written and compared."""
        said = (
            f"{len(self.changed)} tensors merged, {len(self.copied)} copied, and {len(self.others)} files that are not"
            f" weights copied; all of it was read back from the disk and compared by SHA-256: the merged tensors equal"
            " what was computed, the copied ones and the files equal the base bit for bit"
        )
        if self.left_out:
            said += f"; left out of the base: {listed(self.left_out)}"
        if self.not_finite:
            said += f"; the base itself holds numbers that are not finite in {listed(self.not_finite)}"
        return said


def export_merged(
    base: str | Path,
    to: str | Path,
    *,
    adapter: LoraFactors | None,
    replaced: Mapping[str, Tensor],
    from_base: bool = True,
    about: About | None = None,
    check_replaceable: Callable[[Path], None] | None = None,
) -> Merged:
    """Write the trained model as one checkpoint in the layout of `base`.

    Trained tensors are computed in float32 and rounded once to their stored dtype; all other tensors, `mtp.*` included,
    are copied byte for byte. One tensor is held in memory at a time. If training did not start from weights of `base`,
    or it has none, `replaced` must hold every parameter, and the released layout is written.

    Args:
        replaced: trained parameters by name; routed experts one by one, as `PARAMETER::EXPERT`.
        from_base: whether training started from the weights in `base`; False: they are ignored.
        about: contents of the model card and the export mark; None: neither is written.
        check_replaceable: see `whole_folder`.

    Raises:
        CheckpointError: a trained tensor does not occur in `base`, has another shape, or is not finite; nothing was
            trained; `to` is not free; or the files do not read back as written.
    """
    base = Path(base)
    config = ModelConfig.from_folder(base)
    trained = Trained(config, adapter, replaced)
    with whole_folder(to, check_replaceable=check_replaceable) as folder:
        others = {name_beside(path.as_posix()) if about else path.as_posix(): path for path in companions(base)}
        hashes = {name: copy_file(base / path, folder / name) for name, path in others.items()}
        if from_base and has_weights(base):
            merged = _rewrite(base, folder, config, trained, hashes)
        else:
            merged = _write(base, folder, config, trained, hashes)
        check_written(folder, hashes)
        merged = merged._replace(others=sorted(others))
        if about is not None:
            write_about(folder, about, hashes, {"left_out": merged.left_out, "not_finite": merged.not_finite})
    return merged


def _rewrite(base: Path, folder: Path, config: ModelConfig, trained: Trained, hashes: dict[str, str]) -> Merged:
    """Copy the weight files of `base` with the trained tensors replaced; adds the files' hashes to `hashes`."""
    checkpoint = open_checkpoint(base)
    slots = match(checkpoint, config)
    changed: list[str] = []
    copied: list[str] = []
    not_finite: list[str] = []

    def value(name: str, stored: Stored) -> Tensor | None:
        if checkpoint.tensors.get(name) != stored or name not in slots or not trained.touches(slots[name]):
            copied.append(name)
            return None
        changed.append(name)
        return rounded(name, trained.value(slots[name], lambda: checkpoint.read(name)), stored.torch_dtype)

    for file in checkpoint.by_file():
        hashes[file] = rewrite_file(base / file, folder / file, value, not_finite.append)
    carried, left_out = _beside(checkpoint, slots)
    for file in carried:
        hashes[file] = rewrite_file(base / file, folder / file, value, not_finite.append)
    if not (base / SINGLE).exists():
        hashes[INDEX] = copy_file(base / INDEX, folder / INDEX)
    if open_checkpoint(folder).tensors != checkpoint.tensors:
        raise CheckpointError(f"the weights do not read back as tensors of {base}; check the disk, then export again")
    return Merged(changed, copied, [], left_out, not_finite)


def _beside(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> tuple[list[str], list[str]]:
    """The entries of a base folder that are neither loaded nor companions: those to copy, and those to leave out.

    Files that hold only the multi-token-prediction module are copied. Anything else would be another format of the
    untrained weights, and is left out.
    """
    read = set(checkpoint.by_file())
    folders = {file.partition("/")[0] for file in read if "/" in file}
    carried, left_out = [], []
    for path in sorted(checkpoint.folder.iterdir()):
        is_known = path.name in read or path.name in folders or is_companion(path)
        if is_known or path.name.startswith(".") or path.name in ("additional_chat_templates", INDEX):
            continue
        if path.is_dir():
            left_out.append(f"{path.name}/")
        elif path.suffix == ".safetensors" and all(is_carried(name) for name in read_header(path)):
            carried.append(path.name)
        else:
            left_out.append(path.name)
    return carried, left_out


def _write(base: Path, folder: Path, config: ModelConfig, trained: Trained, hashes: dict[str, str]) -> Merged:
    """Write a checkpoint in which every tensor was trained; adds the files' hashes to `hashes`."""
    slots = stored_tensors(config)
    absent = [name for name, slot in slots.items() if not trained.touches(slot)]
    if absent:
        raise CheckpointError(f"neither the base nor the training state holds {listed(absent)}")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, values.get("torch_dtype") or values.get("dtype") or "float32")
    computed: dict[str, str] = {}

    def read(name: str) -> Tensor:
        value = rounded(name, trained.value(slots[name], _no_values), dtype)
        computed[name] = _hash(value)
        return value

    write_shards(folder, {name: Entry(dtype, slot.shape) for name, slot in slots.items()}, read, MAX_SHARD_BYTES)
    written = {path.name for path in folder.iterdir() if path.is_file()} - hashes.keys()
    hashes |= {name: hash_on_disk(folder / name) for name in written}
    checkpoint = open_checkpoint(folder)
    wrong = [name for name in computed if _hash(checkpoint.read(name)) != computed[name]]
    if wrong or checkpoint.tensors.keys() != computed.keys():
        raise CheckpointError(
            f"{folder}: {listed(wrong) or 'not all tensors'} not read back as written; check the disk"
        )
    left_out = [path.name for path in sorted(base.iterdir()) if path.is_file() and not is_companion(path)]
    return Merged(list(computed), [], [], [name for name in left_out if not name.startswith(".")], [])


def _no_values() -> Tensor:
    raise AssertionError("every tensor was found among the trained ones")


def _hash(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
