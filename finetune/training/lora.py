"""LoRA adapters: selects target modules, injects adapters, and asserts that exactly those modules have them.

peft adapts linear layers, without its model wrapper: `inject_adapter_in_model` replaces each target `nn.Linear` in
place. The weight of an adapted module becomes `...base_layer.weight`, its factors `...lora_A.default.weight` and
`...lora_B.default.weight`; no other parameter is renamed. `Experts.adapt` adapts the routed experts, with one pair of
factors per expert and matrix: peft would materialise the adapted weights of all experts in every forward pass.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.kernels.torch.lora import adapted_linear
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import Experts

ADAPTER = "default"
ALL_LINEAR = "all-linear"
SHARED_EXPERT = ("gate_proj", "up_proj", "down_proj")
EXPERT_MATRICES = ("gate_up_proj", "down_proj")


class AdapterError(ValueError):
    """The requested adapters cannot be applied to this model, or an adapter cannot be loaded into it."""


class AdaptedLinear(Linear):  # type: ignore[misc]
    """peft's LoRA linear layer without dropout, computed by one autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return adapted_linear(x, self.base_layer.weight, a, b, self.scaling[ADAPTER])


def target_modules(model: HybridMoEForCausalLM, targets: Sequence[str]) -> list[str]:
    """Full names of the modules that `targets` select in this model, in order.

    A target is the last part of a module's name (`q_proj`; `experts` for the routed experts), `shared_expert` for its
    three projections, or `all-linear` for all of these but the routed experts. A layer need not have every target.

    Raises:
        AdapterError: a target that no layer of this model has.
    """
    names = []
    found = set()
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        target = "shared_expert" if parent.endswith(".shared_expert") and last in SHARED_EXPERT else last
        in_mixer = parent.endswith((".self_attn", ".linear_attn"))
        is_linear = isinstance(module, nn.Linear) and (in_mixer or target == "shared_expert")
        asked = target in targets or (is_linear and ALL_LINEAR in targets)
        if asked and (is_linear or isinstance(module, Experts)):
            names.append(name)
            found |= {target, ALL_LINEAR} if is_linear else {target}
    missing = [target for target in targets if target not in found]
    if missing:
        raise AdapterError(f"lora.targets: no layer of this model has {', '.join(missing)}; leave it out")
    return names


def inject(
    model: HybridMoEForCausalLM,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    rslora: bool = False,
) -> list[str]:
    """Inject adapters into the targets and freeze everything else; return the names of the adapted modules.

    Factor A is random and factor B is zero, so the adapted model initially equals the base model. Each expert has its
    own seed, so its factor A is the same on any number of ranks. With dropout, linear layers use peft's slower forward.

    Args:
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
    """
    names = target_modules(model, targets)
    experts = [name for name in names if isinstance(model.get_submodule(name), Experts)]
    linear = [name for name in names if name not in experts]
    assert not (experts and dropout), "a recipe with dropout on the routed experts is refused"
    model.requires_grad_(False)
    if linear:
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear, bias="none", use_rslora=rslora
        )
        if not dropout:
            config._register_custom_module({nn.Linear: AdaptedLinear})  # documented by peft despite the underscore
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name in experts:
        module = model.get_submodule(name)
        assert isinstance(module, Experts)
        module.adapt(rank, alpha / (math.sqrt(rank) if rslora else rank))
        for matrix, factor in module.lora_A.items():
            for place, expert in enumerate(model.local_experts):
                _draw(factor.data[place], f"{seed}:{name}.{matrix}[{expert}]")
    _assert_adapted(model, linear, experts)
    return names


def _draw(factor: Tensor, key: str) -> None:
    """Initialise factor A of one expert as peft does for a linear layer: uniform, bound 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    bound = 1 / math.sqrt(factor.shape[1])
    factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


def _assert_adapted(model: nn.Module, linear: list[str], experts: list[str]) -> None:
    """Assert that exactly these modules have adapters, and that exactly their factors train."""
    by_peft = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert by_peft == linear, f"peft adapted {sorted(set(by_peft) ^ set(linear))[:5]} other than asked"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"{name}.lora_{factor}.{ADAPTER}.weight" for name in linear for factor in "AB"}
    expected |= {f"{name}.lora_{f}.{matrix}" for name in experts for f in "AB" for matrix in EXPERT_MATRICES}
    assert trainable == expected, f"other parameters train than asked: {sorted(trainable ^ expected)[:5]}"


def adapter_scale(model: nn.Module) -> dict[str, float] | None:
    """Rank and scaling of a model's adapters; None without adapters."""
    for module in model.modules():
        if isinstance(module, Experts) and module.lora_A:
            return {"rank": next(iter(module.lora_A.values())).shape[1], "scaling": module.lora_scale}
        if isinstance(module, Linear):
            return {"rank": module.r[ADAPTER], "scaling": module.scaling[ADAPTER]}
    return None


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the `with` block, which leaves the frozen base model."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | Experts)]
    _switch(layers, on=False)
    try:
        yield
    finally:
        _switch(layers, on=True)


def _switch(layers: Sequence[BaseTunerLayer | Experts], *, on: bool) -> None:
    for layer in layers:
        if isinstance(layer, Experts):
            layer.lora_on = on
        else:
            layer.enable_adapters(on)
