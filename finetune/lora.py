"""Low-rank adapters: which modules, put in place by peft without a wrapper, and proof that exactly those were.

peft's `inject_adapter_in_model` replaces each target `nn.Linear` in place, so no other parameter is renamed: the
weight of an adapted module becomes `...base_layer.weight`, its factors `...lora_A.default.weight` and `lora_B`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune.model.model import HybridMoEForCausalLM

ADAPTER = "default"
SHARED_EXPERT = ("gate_proj", "up_proj", "down_proj")


class AdapterError(ValueError):
    """Adapters that the recipe asks for and this model has no place for."""


def target_modules(model: HybridMoEForCausalLM, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` mean in this model, in order.

    A target is the last part of a module's name (`q_proj`), or `shared_expert` for its three projections. Layers that
    have no such module simply have none; a target that no layer has is an error.

    Raises:
        AdapterError: a target that no layer of this model has.
    """
    names = []
    found = set()
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        target = "shared_expert" if parent.endswith(".shared_expert") and last in SHARED_EXPERT else last
        in_mixer = parent.endswith((".self_attn", ".linear_attn"))
        if isinstance(module, nn.Linear) and target in targets and (in_mixer or target == "shared_expert"):
            names.append(name)
            found.add(target)
    missing = [target for target in targets if target not in found]
    if missing:
        raise AdapterError(f"lora.targets: no layer of this model has {', '.join(missing)}; leave it out")
    return names


def inject(
    model: HybridMoEForCausalLM, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> list[str]:
    """Adapt the targets and freeze everything else; return the names of the adapted modules.

    Factor A is drawn with a seed of its own, factor B is zero, so the adapted model starts as the base model.
    """
    names = target_modules(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert adapted == names, f"peft adapted {sorted(set(adapted) ^ set(names))[:5]} other than asked"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"{name}.lora_{factor}.{ADAPTER}.weight" for name in names for factor in "AB"}
    assert trainable == expected, f"peft left other parameters trainable: {sorted(trainable ^ expected)[:5]}"
    return names


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """The frozen base: adapters switched off inside the `with` block."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
