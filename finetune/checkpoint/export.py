"""What a run trained, as a folder that other tools load: the whole merged checkpoint, or a peft adapter.

Every export is read back before its folder gets its name. A trained tensor that has no place in the export is an error:
nothing is dropped in silence.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.checkpoint.folder import copy_companions, whole_folder
from finetune.checkpoint.layout import (
    CheckpointError,
    Shape,
    Slot,
    is_expert_parameter,
    parameter_shapes,
    stored_tensors,
)
from finetune.checkpoint.shards import INDEX, SINGLE, Entry, has_weights, listed, open_checkpoint, write_shards
from finetune.checkpoint.weights import MAX_SHARD_BYTES, match
from finetune.model.config import ModelConfig

# On a transformers model of this family peft turns adapter targets with these names into targets on the routed experts
# and the router (it takes them for the modules of transformers 4), and leaves the modules that were meant untouched.
# Source: `_convert_peft_config_moe`, peft 0.21.
_REDIRECTED_BY_PEFT = ("gate", "gate_proj", "up_proj", "down_proj")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.default\.weight::fp32")
_EXPERT_FACTOR = re.compile(
    r"(?P<experts>.+\.mlp\.experts)\.lora_(?P<factor>[AB])\.(?P<matrix>\w+)::fp32::(?P<expert>\d+)"
)
_WEIGHT = re.compile(r"(?P<parameter>.+)::fp32(?P<expert>::\d+)?")


class LoraFactors(NamedTuple):
    """Low-rank factors: the weight of a module, or one matrix of one expert, grows by alpha / rank * B @ A."""

    rank: int
    alpha: float
    dropout: float  # of the training; the merged weights do not depend on it
    modules: dict[str, tuple[Tensor, Tensor]]  # module name in our model -> A (rank, in), B (out, rank); float32
    # Those of the routed experts, read when asked for: `PARAMETER::EXPERT::A` (rank, in), `::B` (out, rank); float32.
    experts: Mapping[str, Tensor] = MappingProxyType({})


class Renamed(Mapping[str, Tensor]):
    """Tensors of another mapping under other names, read when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def split_trained(
    tensors: Mapping[str, Tensor], *, alpha: float, dropout: float
) -> tuple[LoraFactors | None, Mapping[str, Tensor]]:
    """The trained weights in a training state: the LoRA factors, and the parameters that were trained themselves.

    The latter are named by parameter, routed experts by `PARAMETER::EXPERT`, and read when asked for, as are factors
    of the routed experts. Optimizer state is left out.

    Args:
        tensors: names as the trainer gives them: `PARAMETER::fp32`, for routed experts `PARAMETER::fp32::EXPERT`.

    Raises:
        CheckpointError: a factor without its other half, or factors of different ranks.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    on_experts: dict[str, str] = {}
    for name in tensors:
        if factor := _FACTOR.fullmatch(name):
            factors.setdefault(factor["module"], {})[factor["factor"]] = tensors[name]
        elif factor := _EXPERT_FACTOR.fullmatch(name):
            on_experts[f"{factor['experts']}.{factor['matrix']}::{factor['expert']}::{factor['factor']}"] = name
        elif weight := _WEIGHT.fullmatch(name):
            names[weight["parameter"].replace(".base_layer.", ".") + (weight["expert"] or "")] = name
    replaced = Renamed(tensors, names)
    if not factors and not on_experts:
        return None, replaced
    lone = [module for module, pair in factors.items() if pair.keys() != {"A", "B"}]
    if lone:
        raise CheckpointError(f"the training state holds one LoRA factor of two for {listed(lone)}; it is damaged")
    ranks = {pair["A"].shape[0] for pair in factors.values()}
    for name in list(on_experts)[:1]:  # the others when they are read
        ranks.add(tensors[on_experts[name]].shape["AB".index(name[-1])])
    if len(ranks) > 1:
        raise CheckpointError(f"the training state mixes LoRA ranks {sorted(ranks)}; one run trains one rank")
    modules = {module: (pair["A"], pair["B"]) for module, pair in factors.items()}
    return LoraFactors(ranks.pop(), alpha, dropout, modules, Renamed(tensors, on_experts)), replaced


def export_merged(base: Path, to: Path, *, adapter: LoraFactors | None, replaced: Mapping[str, Tensor]) -> list[str]:
    """Write `base` with what was trained as one checkpoint in the layout of `base`; gives the names of changed tensors.

    Files are copied and the changed tensors rewritten in place, computed in float32 and rounded once to the dtype they
    are stored in; everything else, `mtp.*` included, stays as it is to the byte. Holds one tensor in memory at a time.
    When `base` has no weights (a run from scratch), `replaced` must hold every parameter, and the released layout is
    written.

    Args:
        replaced: trained parameters by name; routed experts one by one, as `PARAMETER::EXPERT`.

    Raises:
        CheckpointError: a trained tensor has no place in `base`, has another shape, or is not finite; nothing was
            trained; `to` is not free; or what was written does not read back.
    """
    config = ModelConfig.from_folder(base)
    trained = _Trained(config, adapter, replaced)
    with whole_folder(to) as folder:
        copy_companions(base, folder)
        hashes = _rewrite(base, folder, config, trained) if has_weights(base) else _write(folder, config, trained)
        _verify(folder, hashes)
    return list(hashes)


def export_adapter(
    base: Path, to: Path, *, adapter: LoraFactors | None, replaced: Mapping[str, Tensor], base_name: str
) -> list[str]:
    """Write the LoRA factors as a folder that peft loads on transformers' model; gives the names of adapted modules.

    Factors of the routed experts are written as peft's own on the stacked parameters of transformers' model; engines
    that store experts one by one may not read them, and want the merged form.

    Args:
        base_name: the model that the adapter belongs to, as its users call it: a hub repository or a folder.

    Raises:
        CheckpointError: the run trained something that an adapter cannot hold, or that peft would put in another place;
            a factor does not fit `base`; `to` is not free; or what was written does not read back.
    """
    if adapter is None or replaced:
        what = f"parameters themselves ({listed(list(replaced))})" if replaced else "nothing by LoRA"
        raise CheckpointError(f"the run trained {what}, which an adapter cannot hold; export with --format merged")
    misplaced = [name for name in adapter.modules if name.rsplit(".", 1)[-1] in _REDIRECTED_BY_PEFT]
    if misplaced:
        raise CheckpointError(
            f"peft would load the factors of {listed(misplaced)} on the routed experts instead; export with "
            "--format merged"
        )
    trained = _Trained(ModelConfig.from_folder(base), adapter, replaced)
    tensors = _expert_tensors(trained)
    for module, (a, b) in adapter.modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    with whole_folder(to) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_adapter_config(folder, adapter, trained.adapted_experts, base_name)
        with safe_open(folder / "adapter_model.safetensors", "pt") as read:
            stored = set(read.keys())
            wrong = [name for name in tensors if name not in stored or not read.get_tensor(name).equal(tensors[name])]
        config = LoraConfig.from_pretrained(folder)
        targets = {*(config.target_modules or ()), *(config.target_parameters or ())}
        if wrong or targets != {*adapter.modules, *trained.adapted_experts}:
            raise CheckpointError(f"{to}: does not read back as written ({listed(wrong) or 'targets'}); check the disk")
    return sorted({*adapter.modules, *(name.rpartition(".")[0] for name in trained.adapted_experts)})


def _expert_tensors(trained: "_Trained") -> dict[str, Tensor]:
    """Factors of the routed experts as peft stores those of stacked parameters.

    A of all experts one below the other; B with the experts innermost. Each parameter has a wrapper of its own: the
    outer one is of `down_proj`, its `base_layer` the one of `gate_up_proj`.

    Source: `ParamWrapper`, peft 0.21.
    """
    tensors = {}
    for parameter in sorted(trained.adapted_experts):
        module, _, matrix = parameter.rpartition(".")
        wrapper = f"base_model.model.{module}" + (".base_layer" if matrix == "gate_up_proj" else "")
        pairs = [trained.expert_factors(parameter, expert) for expert in range(trained.shapes[parameter][0])]
        tensors[f"{wrapper}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"{wrapper}.lora_B.weight"] = torch.stack([b for _, b in pairs], dim=-1).flatten(1)
    return tensors


def _write_adapter_config(folder: Path, adapter: LoraFactors, parameters: Collection[str], base_name: str) -> None:
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        lora_dropout=adapter.dropout,
        # Whole names: a suffix such as `out_proj` would also adapt modules that this run did not train.
        target_modules=list(adapter.modules),
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])  # peft writes a set, in any order
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Trained:
    """What was trained, checked against the model: every tensor has a place."""

    def __init__(self, config: ModelConfig, adapter: LoraFactors | None, replaced: Mapping[str, Tensor]):
        self.shapes = shapes = parameter_shapes(config)
        if adapter is None and not replaced:
            raise CheckpointError("the training state holds no trained weights; there is nothing to export")
        self.replaced = replaced
        self.factors = {f"{module}.weight": pair for module, pair in adapter.modules.items()} if adapter else {}
        self.on_experts = adapter.experts if adapter else {}
        self.adapted_experts = {name.split("::")[0] for name in self.on_experts}
        self.rank, self.scaling = (adapter.rank, adapter.alpha / adapter.rank) if adapter else (0, 0.0)
        for name, (a, b) in self.factors.items():
            if len(shapes.get(name, ())) != 2:
                raise CheckpointError(f"LoRA factors for {name.removesuffix('.weight')}: the model has no such matrix")
            _check_product(name, a, b, shapes[name])
        self._check_expert_factors()
        self._check_replaced()

    def _check_expert_factors(self) -> None:
        """Where one matrix of one expert of a layer is adapted, both matrices of all of them must be."""
        layers = {name.rpartition(".")[0] for name in self.adapted_experts}
        places = {
            f"{_piece(name, expert)}::{factor}"
            for name, shape in self.shapes.items()
            if is_expert_parameter(name) and name.rpartition(".")[0] in layers
            for expert in range(shape[0])
            for factor in "AB"
        }
        if homeless := sorted(self.on_experts.keys() - places):
            raise CheckpointError(f"LoRA factors have no place in the model: {listed(homeless)}")
        if absent := sorted(places - self.on_experts.keys()):
            raise CheckpointError(f"LoRA factors of experts are missing from the training state: {listed(absent)}")

    def _check_replaced(self) -> None:
        places = {
            place
            for name, shape in self.shapes.items()
            for place in ([_piece(name, expert) for expert in range(shape[0])] if is_expert_parameter(name) else [name])
        }
        homeless = [name for name in self.replaced if name not in places]
        if homeless:
            raise CheckpointError(f"trained tensors have no place in the model: {listed(homeless)}")
        started = {name.split("::")[0] for name in self.replaced}
        absent = [place for place in places if place.split("::")[0] in started and place not in self.replaced]
        if absent:
            raise CheckpointError(f"trained experts are missing from the training state: {listed(sorted(absent))}")

    def touches(self, slot: Slot) -> bool:
        """Whether training changed the stored tensor of `slot`."""
        return slot.parameter in self.factors or slot.parameter in self.adapted_experts or self._replaces(slot)

    def value(self, slot: Slot, stored: Callable[[], Tensor]) -> Tensor:
        """The trained values of a stored tensor, float32.

        Args:
            stored: its values before training; called only where `replaced` does not hold the tensor.
        """
        if not self._replaces(slot):
            value = stored().float()
        elif slot.fused:
            value = torch.stack([self._replacement(slot, expert) for expert in range(slot.shape[0])])
        else:
            value = self._replacement(slot, slot.expert)
            value = value if slot.rows is None else value[slot.rows]
        if slot.parameter in self.factors:
            a, b = self.factors[slot.parameter]
            value = value + self.scaling * (b.float().cpu() @ a.float().cpu())
        elif slot.parameter in self.adapted_experts:
            if slot.expert is None:
                value = torch.stack([whole + self._growth(slot.parameter, e) for e, whole in enumerate(value)])
            else:
                growth = self._growth(slot.parameter, slot.expert)
                value = value + (growth if slot.rows is None else growth[slot.rows])
        return value

    def expert_factors(self, parameter: str, expert: int) -> tuple[Tensor, Tensor]:
        """A and B of one matrix of one expert, float32."""
        a, b = (self.on_experts[f"{_piece(parameter, expert)}::{factor}"].float().cpu() for factor in "AB")
        _check_product(_piece(parameter, expert), a, b, self.shapes[parameter][1:], self.rank)
        return a, b

    def _growth(self, parameter: str, expert: int) -> Tensor:
        a, b = self.expert_factors(parameter, expert)
        return self.scaling * (b @ a)

    def _replaces(self, slot: Slot) -> bool:
        return _piece(slot.parameter, 0 if slot.fused else slot.expert) in self.replaced

    def _replacement(self, slot: Slot, expert: int | None) -> Tensor:
        piece, whole = _piece(slot.parameter, expert), self.shapes[slot.parameter]
        value, shape = self.replaced[piece], whole if expert is None else whole[1:]
        if tuple(value.shape) != shape:
            raise CheckpointError(f"trained {piece}: {list(value.shape)} does not make {list(shape)}")
        return value.float()


def _check_product(name: str, a: Tensor, b: Tensor, shape: Shape, rank: int | None = None) -> None:
    inner = a.shape[0] if rank is None else rank
    if (tuple(a.shape), tuple(b.shape)) != ((inner, shape[1]), (shape[0], inner)):
        raise CheckpointError(f"LoRA factors of {name}: {list(b.shape)} x {list(a.shape)} does not make {list(shape)}")


def _piece(parameter: str, expert: int | None) -> str:
    return parameter if expert is None else f"{parameter}::{expert}"


def _rewrite(base: Path, folder: Path, config: ModelConfig, trained: _Trained) -> dict[str, str]:
    """Copy the weight files of `base` and rewrite what was trained; gives the hashes of the rewritten tensors."""
    checkpoint = open_checkpoint(base)
    slots = match(checkpoint, config)
    hashes: dict[str, str] = {}
    for file, names in checkpoint.by_file().items():
        shutil.copyfile(base / file, folder / file)
        with safe_open(base / file, "pt") as source, (folder / file).open("r+b") as copy:
            for name in names:
                if name not in slots or not trained.touches(slots[name]):
                    continue
                stored = checkpoint.tensors[name]
                value = trained.value(slots[name], partial(source.get_tensor, name))
                rounded = _rounded(name, value, stored.torch_dtype)
                copy.seek(stored.start)
                copy.write(_bytes(rounded))
                hashes[name] = _hash(rounded)
    if not (base / SINGLE).exists():
        shutil.copyfile(base / INDEX, folder / INDEX)
    if open_checkpoint(folder).tensors != checkpoint.tensors:
        raise CheckpointError(f"{folder}: does not hold the tensors of {base} after writing; check the disk")
    return hashes


def _write(folder: Path, config: ModelConfig, trained: _Trained) -> dict[str, str]:
    """Write a checkpoint of which every tensor was trained; gives the hashes of the tensors."""
    slots = stored_tensors(config)
    absent = [name for name, slot in slots.items() if not trained.touches(slot)]
    if absent:
        raise CheckpointError(f"neither the base nor the training state holds {listed(absent)}")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, values.get("torch_dtype") or values.get("dtype") or "float32")
    hashes: dict[str, str] = {}

    def read(name: str) -> Tensor:
        rounded = _rounded(name, trained.value(slots[name], _no_values), dtype)
        hashes[name] = _hash(rounded)
        return rounded

    write_shards(folder, {name: Entry(dtype, slot.shape) for name, slot in slots.items()}, read, MAX_SHARD_BYTES)
    return hashes


def _no_values() -> Tensor:
    raise AssertionError("every tensor was found among the trained ones")


def _verify(folder: Path, hashes: dict[str, str]) -> None:
    wrong = []
    for file, names in open_checkpoint(folder).by_file().items():
        with safe_open(folder / file, "pt") as opened:
            wrong += [name for name in names if name in hashes and _hash(opened.get_tensor(name)) != hashes[name]]
    if wrong:
        raise CheckpointError(f"{folder}: {listed(wrong)} do not read back as written; check the disk")


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"{name}: the base stores it as {dtype}, into which nothing can be merged; use another base"
        )
    rounded = value.to("cpu", dtype).contiguous()
    if not rounded.isfinite().all():
        raise CheckpointError(
            f"{name}: holds infinite or undefined numbers after training; resume an earlier checkpoint"
        )
    return rounded


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().view(-1).view(torch.uint8).numpy().data


def _hash(value: Tensor) -> str:
    return hashlib.sha256(_bytes(value)).hexdigest()
