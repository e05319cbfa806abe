"""Loading and saving of model weights in the released layout, one stored tensor at a time.

A rank of an expert-parallel run reads only its own experts. Saved folders have the format of released ones: experts
stored one by one, numbered files with an index, and byte-for-byte copies of all files of the base that are not weights.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # HTTPError: of its client
from torch import Tensor, nn

from finetune.checkpoint.finite import all_finite, check_finite
from finetune.checkpoint.folder import WEIGHT_SUFFIXES, copy_companions, whole_folder, write_json
from finetune.checkpoint.header import Stored
from finetune.checkpoint.layout import (
    CheckpointError,
    Slot,
    is_carried,
    is_fused,
    parameter_shapes,
    stored_tensors,
)
from finetune.checkpoint.released import released_config
from finetune.checkpoint.shards import (
    Checkpoint,
    Entry,
    Wanted,
    listed,
    open_checkpoint,
    read_into,
    write_shards,
)
from finetune.model.config import ModelConfig
from finetune.model.model import HybridMoEForCausalLM, parameter_dtype

MAX_SHARD_BYTES = 5e9  # as in the hub's own tools
TRAINED = ("F32", "BF16", "F16", "F64")  # stored dtypes; all are cast to the dtype of the run
PROGRESS_SECONDS = 10.0  # between two progress messages of a long load

Convert = Callable[[str, Tensor], Tensor]  # maps a parameter's name and value to its replacement

_CHECKOUT = Path(__file__).resolve().parents[2]


def resolve_model(path: str | Path) -> Path:
    """The folder of a model: a local one (relative to the working directory, then to the checkout), or a hub download.

    A hub repository is downloaded once, into the cache of `huggingface_hub`; this needs the network.

    Raises:
        CheckpointError: no such folder, and no such repository can be downloaded.
    """
    path = str(path)
    for folder in (Path(os.path.expanduser(path)), _CHECKOUT / path):
        if folder.is_dir():
            return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise CheckpointError(f"{path}: no such folder; point at a checkpoint folder or a hub repository OWNER/NAME")
    try:
        # `original/` and the other formats would double the download of 160 GB.
        unused = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if not suffix.startswith(".safetensors")]
        return Path(snapshot_download(path, ignore_patterns=[*unused, "*.h5", "*.msgpack", "original/*", "onnx/*"]))
    except (OSError, HTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{path}: no such folder, and the hub does not give a repository of that name ({reason}); check the name "
            "and the network, or download it and point at the folder"
        ) from error


def match(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Slot]:
    """The position in our parameters of every stored tensor that the model loads.

    With tied embeddings a stored `lm_head.weight` is accepted and mapped to the embeddings.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape than in `config`, or of a dtype that cannot be
            trained.
    """
    found = checkpoint.tensors
    slots = stored_tensors(config, fused=is_fused(found))
    _check_dtypes(checkpoint, slots)
    if config.tie_word_embeddings and "lm_head.weight" in found:
        slots["lm_head.weight"] = slots["model.embed_tokens.weight"]
    faults = {
        "missing": [name for name in slots if name not in found],
        "unknown": [
            f"{name} (in {at.file})" for name, at in found.items() if name not in slots and not is_carried(name)
        ],
        "of another shape": [
            f"{name} (in {found[name].file}: {list(found[name].shape)}, expected {list(slot.shape)})"
            for name, slot in slots.items()
            if name in found and found[name].shape != slot.shape
        ],
    }
    told = [f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise CheckpointError(
            f"{checkpoint.folder}: the weights do not fit config.json; {'; '.join(told)}; "
            "download the checkpoint again, or correct config.json"
        )
    return slots


def _check_dtypes(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    wrong = {name: at for name, at in checkpoint.tensors.items() if name in slots and at.dtype not in TRAINED}
    if wrong:
        kinds = sorted({at.dtype for at in wrong.values()})
        why = "float8 needs its scales, which are not read; " if any(kind.startswith("F8") for kind in kinds) else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(wrong)} tensors hold {', '.join(kinds)}, which does not train; {why}use the"
            " checkpoint in bfloat16, float16 or float32: "
            + listed([f"{name} (in {at.file}: {at.dtype})" for name, at in wrong.items()])
        )


def load_weights(
    model: HybridMoEForCausalLM,
    folder: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda line: None,
    convert: Convert | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Load weights from `folder` into `model` (usually on the meta device), of the experts only those it holds.

    Reads every header, and each value that this model holds once, directly into its parameter. Additional host memory:
    `shards.STAGING_BYTES` and the table of stored tensors (under 100 MB for the 74,391 of the 80B model).

    Every parameter is replaced by a new one with the same `requires_grad` and attributes, so load before creating an
    optimizer or an adapter.

    Args:
        say: called every `PROGRESS_SECONDS` of a long load with a progress message.
        convert: called once for each parameter with its name and its whole value on `device`; its result, of any dtype
            and shape, becomes the parameter (e.g. a quantised form of frozen weights). At most one module's values are
            held unconverted at a time.
        progress: called after each read from a file.

    Raises:
        CheckpointError: the folder does not hold this model, or holds NaN or infinity.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    slots = match(checkpoint, model.settings)
    _check_tied(checkpoint, model.settings)
    held = {name: slots[name] for name in checkpoint.tensors if _is_held(slots.get(name), model.local_experts)}

    def check(parameter: str, value: Tensor) -> None:
        if not all_finite(value):
            parts = {name: slot for name, slot in held.items() if slot.parameter == parameter}
            local = model.local_experts.start
            check_finite(folder, {n: (checkpoint.tensors[n].file, s.of(value, local)) for n, s in parts.items()})

    places = _Places(model, dtype, device, Counter(slot.parameter for slot in held.values()), check, convert)
    whole = sum(_stored_bytes(checkpoint.tensors[name], slot, model) for name, slot in held.items())
    files = [(file, names) for file, names in _by_file(checkpoint, held).items()]
    done, began = 0, time.monotonic()
    told = began
    for number, (file, names) in enumerate(files, start=1):
        for together in places.portions(names, held):
            wanted = [_wanted(checkpoint.tensors[name], held[name], places, model.local_experts) for name in together]
            read_into(folder / file, wanted, progress)
            done += sum(one.size_bytes for one in wanted)
            del wanted  # it references values that are converted now
            places.arrived(held[name].parameter for name in together)
        now = time.monotonic()
        if now - told >= PROGRESS_SECONDS and number < len(files):
            told, rate = now, done / (now - began)
            say(
                f"reading weights: {done / 1e9:.1f} of {whole / 1e9:.1f} GB of this rank, {number} of {len(files)}"
                f" files, {rate / 1e9:.2f} GB/s, {(whole - done) / rate:.0f} s left"
            )
    places.check_all_filled()


def _is_held(slot: Slot | None, local: range) -> bool:
    return slot is not None and (slot.expert is None or slot.expert in local)


def _by_file(checkpoint: Checkpoint, held: Mapping[str, Slot]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in held:
        files.setdefault(checkpoint.tensors[name].file, []).append(name)
    return files


def _stored_bytes(stored: Stored, slot: Slot, model: HybridMoEForCausalLM) -> int:
    """The number of bytes of a stored tensor that this model reads."""
    size = stored.end - stored.start
    return size * len(model.local_experts) // slot.shape[0] if slot.fused else size


def _wanted(stored: Stored, slot: Slot, places: "_Places", local: range) -> Wanted:
    """The range of a stored tensor to read: all of it, or this rank's part of stacked experts."""
    start = stored.start
    if slot.fused:
        start += local.start * (stored.end - stored.start) // slot.shape[0]
    return Wanted(start, stored.torch_dtype, slot.of(places.value(slot.parameter), local.start))


class _Places:
    """The parameters of a model during loading: allocated at their first value, and set in the model when complete.

    Without `convert`, one file is read at a time. With it, the consecutive tensors of one module are, and a parameter
    is converted as soon as it is complete.
    """

    def __init__(
        self,
        model: HybridMoEForCausalLM,
        dtype: torch.dtype,
        device: str | torch.device,
        missing: Counter[str],
        check: Callable[[str, Tensor], None],
        convert: Convert | None,
    ):
        """Allocate nothing yet.

        Args:
            missing: the number of stored tensors that make up each parameter.
            check: called with each parameter's name and complete value before it is converted and set.
        """
        self._model, self._dtype, self._device, self._check, self._convert = model, dtype, device, check, convert
        self._old = dict(model.named_parameters())
        self._missing = missing
        self._filling: dict[str, Tensor] = {}
        expected = parameter_shapes(model.settings).keys()
        unknown, absent = self._old.keys() - expected, expected - self._old.keys()
        assert not unknown, f"{unknown} are not parameters of the plain model; load before adding adapters"
        assert not absent, f"not parameters of the model: {absent}"

    def value(self, name: str) -> Tensor:
        """The tensor into which a parameter's values are read."""
        if name not in self._filling:
            self._filling[name] = torch.empty(
                self._old[name].shape, dtype=parameter_dtype(name, self._dtype), device=self._device
            )
        return self._filling[name]

    def portions(self, names: list[str], held: Mapping[str, Slot]) -> list[list[str]]:
        """The stored tensors of one file, in groups that are read together."""
        if self._convert is None:
            return [names]
        modules = groupby(names, lambda name: held[name].parameter.rpartition(".")[0])
        return [list(together) for _, together in modules]

    def arrived(self, parameters: Iterable[str]) -> None:
        """Count one stored tensor as read for each name; complete parameters are set in the model."""
        for name in parameters:
            self._missing[name] -= 1
            if not self._missing[name]:
                self._put(name, self._filling.pop(name))

    def check_all_filled(self) -> None:
        """Assert that every parameter is complete."""
        assert not self._filling, f"not whole: {sorted(self._filling)}"

    def _put(self, name: str, value: Tensor) -> None:
        old = self._old[name]
        self._check(name, value)
        if self._convert is not None:
            value = self._convert(name, value)
        new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        new.__dict__.update(old.__dict__)
        owner, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(owner), attribute, new)
        if self._model.settings.tie_word_embeddings:
            self._model.tie()


def _check_tied(checkpoint: Checkpoint, config: ModelConfig) -> None:
    if not config.tie_word_embeddings or "lm_head.weight" not in checkpoint.tensors:
        return
    if not torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{checkpoint.folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there, or remove the tensor"
        )


def from_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    experts: range | None = None,
    convert: Convert | None = None,
) -> HybridMoEForCausalLM:
    """The model in `folder`, with all experts or those of one rank.

    Args:
        experts: global ids of the experts to hold; None: all.
        convert: see `load_weights`.

    Raises:
        CheckpointError: the weights do not match the configuration.
        ConfigError: no configuration, or that of another model.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    with init_empty_weights(include_buffers=True):
        model = HybridMoEForCausalLM(config, experts)
    load_weights(model, folder, dtype, device, convert=convert)
    assert not any(buffer.is_meta for buffer in model.buffers()), "a buffer has no values: load_weights must compute it"
    return model


def save_pretrained(
    model: HybridMoEForCausalLM,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> None:
    """Write the whole model as a folder in the released layout, whole or absent.

    Args:
        base: checkpoint folder that the model was loaded from. Its configuration, tokenizer, templates, other files and
            `mtp.*` tensors are copied unchanged. None: a configuration is written, and nothing else.
        dtype: of every tensor of the model; by default its dtype in `base`, else that of the model's weights.

    Raises:
        CheckpointError: `folder` is not free, `base` is not a checkpoint of this model, or the disk refused.
    """
    folder = Path(folder)
    base = Path(base) if base is not None else None
    config = model.settings
    assert model.local_experts == range(config.num_experts), "a rank that holds some experts cannot write them all"
    origin = open_checkpoint(base) if base is not None else None
    kept = (
        {slot.parameter: origin.tensors[name].torch_dtype for name, slot in match(origin, config).items()}
        if origin
        else {}
    )
    parameters = dict(model.named_parameters())
    slots = stored_tensors(config)
    entries = {}
    for name, slot in slots.items():
        stored = kept[slot.parameter] if kept else model.lm_head.weight.dtype
        entries[name] = Entry(dtype or stored, slot.shape)
    for name, carried in origin.tensors.items() if origin else ():
        if is_carried(name):
            entries[name] = Entry(carried.torch_dtype, carried.shape)

    def read(name: str) -> Tensor:
        if name in slots:
            slot = slots[name]
            return slot.of(parameters[slot.parameter]).detach().to("cpu", entries[name].dtype)
        assert origin is not None
        return origin.read(name)

    with whole_folder(folder) as partial:
        if base is not None:
            copy_companions(base, partial)
        else:
            first = next(iter(entries.values())).dtype
            write_json(partial / "config.json", released_config(config, first))
        write_shards(partial, entries, read, max_shard_bytes)
