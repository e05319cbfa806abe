"""Initialises LoRA factors from an adapter in peft's format: exported here, or saved by peft on transformers' model.

Rank, scaling and peft's options are compared with the recipe. A stored tensor that no target uses is an error.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.checkpoint.adapter import CONFIG, WEIGHTS
from finetune.checkpoint.shards import listed, read_header
from finetune.recipe.sections import Lora
from finetune.training.lora import ADAPTER, EXPERT_MATRICES, AdapterError
from monitoring.json_file import FileError, read_object

# Options of peft that are not supported here, each with the value that leaves it off.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "layer_replication": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# What peft draws factors by without a change to the base weights; by any other it subtracts them from the base.
_DRAWN = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_LINEAR = re.compile(rf"(?P<module>.+)\.lora_(?P<factor>[AB])\.{ADAPTER}\.weight")
_EXPERTS = re.compile(rf"(?P<module>.+)\.lora_(?P<factor>[AB])\.(?P<matrix>{'|'.join(EXPERT_MATRICES)})")


def check_adapter(folder: Path, lora: Lora) -> None:
    """Check that rank, scaling and options of the adapter in `folder` match the recipe. Reads no weights.

    Raises:
        AdapterError: the folder holds no LoRA adapter in peft's format, or its config contradicts the recipe.
    """
    try:
        config = read_object(folder / CONFIG)
    except (FileError, OSError) as error:
        raise AdapterError(
            f"lora.init_from: {folder}: not an adapter in peft's form ({error}); `python -m finetune export"
            " RUN --format adapter` writes one"
        ) from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"lora.init_from: {folder} holds an adapter of type {config.get('peft_type')}, not LORA")
    for key, ours, name in (
        ("r", lora.rank, "rank"),
        ("lora_alpha", lora.alpha, "alpha"),
        ("use_rslora", lora.use_rslora, "use_rslora"),
    ):
        theirs = config.get(key, False)
        if theirs != ours:
            raise AdapterError(
                f"lora.init_from: {folder} has {key} {_shown(theirs)}; set lora.{name} to that, it is {_shown(ours)}"
            )
    added = [key for key, plain in _PLAIN.items() if (config.get(key) or plain) != plain]
    if added:
        raise AdapterError(f"lora.init_from: {folder} uses {', '.join(added)}, which has no counterpart here")
    drawn = config.get("init_lora_weights")
    if drawn not in _DRAWN:
        raise AdapterError(
            f"lora.init_from: {folder} has init_lora_weights {_shown(drawn)}: its factors belong to base weights that"
            " peft changed when it drew them; save it from peft as a plain LoRA"
            " (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not (folder / WEIGHTS).exists():
        raise AdapterError(f"lora.init_from: {folder} holds no {WEIGHTS}; save the adapter with safetensors")


def adapter_values(
    folder: Path, lora: Lora, parameters: Mapping[str, torch.Size], local_experts: range
) -> dict[str, Tensor]:
    """Read the values of the LoRA parameters from the adapter in `folder`.

    Args:
        parameters: shape on this rank, by parameter name in our model.
        local_experts: expert ids that this rank holds.

    Returns:
        Float32 values by parameter name.

    Raises:
        AdapterError: a tensor is missing, is not finite, has another shape or belongs to no target.
    """
    check_adapter(folder, lora)
    wanted = {name: _stored_name(name) for name in parameters}
    header = read_header(folder / WEIGHTS)
    if homeless := sorted(header.keys() - set(wanted.values())):
        raise AdapterError(
            f"lora.init_from: {folder} holds {listed(homeless)}, which lora.targets does not adapt in this model; add"
            " the target, or take these tensors out of the adapter"
        )
    if absent := sorted(set(wanted.values()) - header.keys()):
        raise AdapterError(
            f"lora.init_from: {folder} lacks {listed(absent)}, which lora.targets adapts; take that target out"
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {
            name: _value(folder, stored, file.get_tensor(stored).float(), parameters[name], lora.rank, local_experts)
            for name, stored in wanted.items()
        }


def _stored_name(name: str) -> str:
    """Convert a parameter name to peft's. In peft the wrapper of `down_proj` encloses that of `gate_up_proj`."""
    if linear := _LINEAR.fullmatch(name):
        return f"{_PREFIX}{linear['module']}.lora_{linear['factor']}.weight"
    on_experts = _EXPERTS.fullmatch(name)
    assert on_experts is not None, f"{name} is no factor of an adapter"
    inside = ".base_layer" if on_experts["matrix"] == "gate_up_proj" else ""
    return f"{_PREFIX}{on_experts['module']}{inside}.lora_{on_experts['factor']}.weight"


def _value(folder: Path, stored: str, value: Tensor, shape: torch.Size, rank: int, local_experts: range) -> Tensor:
    """Convert a stored tensor to the layout of our parameter; of stacked experts, keep those of this rank."""
    if not value.isfinite().all():
        raise AdapterError(f"lora.init_from: {folder}: {stored} holds numbers that are not finite")
    found = tuple(value.shape)
    if len(shape) == 3 and value.dim() == 2:
        if ".lora_A." in stored and value.shape[0] % rank == 0:
            value = value.unflatten(0, (-1, rank))  # (experts x rank, inputs) -> (experts, rank, inputs)
        elif ".lora_B." in stored and value.shape[1] % rank == 0:
            value = value.unflatten(1, (rank, -1)).movedim(-1, 0)  # -> (experts, outputs, rank)
        if value.dim() == 3 and local_experts.stop <= value.shape[0]:
            value = value[local_experts.start : local_experts.stop]
    if value.shape != shape:
        raise AdapterError(
            f"lora.init_from: {folder}: {stored} is {list(found)}, which does not make {list(shape)}; it belongs to"
            " another model"
        )
    return value.contiguous()


def _shown(value: object) -> str:
    return json.dumps(value)
