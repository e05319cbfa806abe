"""Choice of the form of each computation: made once at start, after a trial on this device, and reported.

A fast form is used only if it runs on this device, forward and backward, at the model's widths and dtype, and agrees
with its definition (`trial.py`). The modules of `model/` hold their definitions as attributes; `install` replaces them
by the chosen forms.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from finetune.kernels import trial
from finetune.kernels.cpu.delta_rule_products import gated_delta_rule_by_products
from finetune.kernels.cpu.deltanet import prepare_cpu
from finetune.kernels.torch.experts import experts_grouped
from finetune.kernels.trial import Place
from finetune.model import attention, deltanet
from finetune.model.attention import GatedAttention, Isolate
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.deltanet import GatedDeltaNet, Prepare
from finetune.model.head import token_loss_sum
from finetune.model.layers import (
    MLP,
    GatedNorm,
    GatedRMSNorm,
    RMSNorm,
    add_gated,
    gated_rms_norm,
    residual_norm,
    rms_norm,
    swiglu,
)
from finetune.model.model import Block, HybridMoEForCausalLM
from finetune.model.moe import ExpertCompute, Experts, LocalCompute, MoE, Route, Router, experts_in_a_loop, route

Forms = TypeVar("Forms", "Layers", "Mixers")


class KernelError(ValueError):
    """A kernel that the recipe requires by name does not run on this device and dtype, or is wrong there."""


class Layers(NamedTuple):
    """Forms of norms, router, shared expert and loss; the definitions by default."""

    norm: Callable[..., Tensor] = rms_norm
    add_and_norm: Callable[..., tuple[Tensor, Tensor]] = residual_norm
    route: Route = route
    activate: Callable[[Tensor, Tensor], Tensor] = swiglu
    add_gated: Callable[..., Tensor] = add_gated
    loss: Callable[..., tuple[Tensor, Tensor]] = token_loss_sum


class Mixers(NamedTuple):
    """Forms of DeltaNet and attention between their projections; the definitions by default."""

    prepare_delta: Prepare = deltanet.prepare
    rule: Callable[..., Tensor] = chunked_gated_delta_rule
    gated_norm: GatedNorm = gated_rms_norm
    prepare_attention: Callable[..., tuple[Tensor, Tensor, Tensor]] = attention.prepare
    attend_packed: Callable[..., Tensor] = attention.attend_masked
    isolate: Isolate = attention.document_mask
    gate_output: Callable[[Tensor, Tensor], Tensor] = attention.gate_output


CPU_MIXERS = Mixers(prepare_delta=prepare_cpu, rule=gated_delta_rule_by_products)


@dataclass
class Kernels:
    """The chosen form of every computation that has several forms; the definitions by default."""

    experts: ExpertCompute = experts_in_a_loop
    whole: LocalCompute | None = None  # sort, experts and weighted sum, if one device holds all experts
    layers: Layers = field(default_factory=Layers)
    mixers: Mixers = field(default_factory=Mixers)
    names: dict[str, str] = field(default_factory=dict)  # the chosen forms, as the recipe names them
    said: list[str] = field(default_factory=list)  # each choice and its reason, one sentence each


def choose(
    *, experts: str, layers: str, mixers: str, place: Place, progress: Callable[[], None] = lambda: None
) -> Kernels:
    """Choose the fastest forms that the recipe allows and that pass their trial on this device.

    Args:
        experts: auto, fused, grouped or loop (`kernels.experts` of the recipe).
        layers: auto, fused or plain (`kernels.layers`).
        mixers: auto, fused or plain (`kernels.mixers`).
        progress: called after each trial.

    Raises:
        KernelError: the recipe names a form that does not run here or disagrees with its definition.
    """
    kernels = Kernels()
    kernels.names["experts"] = _choose_experts(experts, place, kernels)
    progress()
    kernels.layers = _chosen("layers", layers, Layers(), {"fused": _fused_layers}, place, kernels)
    progress()
    kernels.mixers = _chosen("mixers", mixers, Mixers(), {"fused": _fused_mixers, "cpu": _cpu_mixers}, place, kernels)
    progress()
    return kernels


def install(model: HybridMoEForCausalLM, kernels: Kernels) -> None:
    """Set the chosen forms in every module of the model."""
    layers, mixers = kernels.layers, kernels.mixers
    local = len(model.local_experts) == model.settings.num_experts
    model.loss, model.isolate = layers.loss, mixers.isolate
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = kernels.experts
        elif isinstance(module, MoE):
            module.whole, module.add_gated = kernels.whole if local else None, layers.add_gated
        elif isinstance(module, Router):
            module.compute = layers.route
        elif isinstance(module, RMSNorm):
            module.compute = layers.norm
        elif isinstance(module, Block):
            module.add_and_norm = layers.add_and_norm
        elif isinstance(module, MLP):
            module.activate = layers.activate
        elif isinstance(module, GatedRMSNorm):
            module.compute = mixers.gated_norm
        elif isinstance(module, GatedDeltaNet):
            module.prepare, module.rule = mixers.prepare_delta, mixers.rule
        elif isinstance(module, GatedAttention):
            module.prepare, module.gate_output = mixers.prepare_attention, mixers.gate_output
            module.attend_packed = mixers.attend_packed


def _choose_experts(kind: str, place: Place, kernels: Kernels) -> str:
    """Under `auto`: fused kernels on a GPU, otherwise torch's grouped product, and the loop if neither runs."""
    if kind == "loop":
        kernels.said.append("experts: loop (the definition), as the recipe asks")
        return kind
    faults = []
    if kind == "fused" or (kind == "auto" and place.device.type == "cuda"):
        try:
            from finetune.kernels.triton.fused_experts import experts_fused, moe_fused

            error = max(trial.experts(experts_fused, place), trial.whole(moe_fused, place))
            kernels.experts, kernels.whole = experts_fused, moe_fused
            kernels.said.append(f"experts: fused kernels, {place}, {_within(error)}")
            return "fused"
        except FAULTS as fault:
            faults.append(f"the fused kernels do not serve here: {_words(fault)}")
    if kind in ("auto", "grouped"):
        try:
            error = trial.experts(experts_grouped, place)
            kernels.experts = experts_grouped
            slower = f" SLOWER than on other GPUs, {faults[0]};" if faults else ""
            kernels.said.append(f"experts:{slower} grouped matrix product, {place}, {_within(error)}")
            return "grouped"
        except FAULTS as fault:
            faults.append(f"the grouped product does not serve here: {_words(fault)}")
    if kind != "auto":
        raise KernelError(
            f"kernels.experts: {kind} does not run in {place} at widths {place.config.hidden_size} and"
            f" {place.config.moe_intermediate_size} with torch {torch.__version__} ({'; '.join(faults)});"
            " use 'auto' or 'loop'"
        )
    kernels.said.append(f"experts: SLOW loop over experts; {'; '.join(faults)}")
    return "loop"


def _chosen(
    name: str,
    kind: str,
    plain: Forms,
    fast: dict[str, Callable[[Place], tuple[Forms, float]]],
    place: Place,
    kernels: Kernels,
) -> Forms:
    """Under `auto`: Triton on a GPU, the CPU forms on a CPU, the definitions on other devices."""
    said, kernels.names[name] = kernels.said, "plain"
    form = {"cuda": "fused", "cpu": "cpu"}.get(place.device.type, "") if kind == "auto" else kind
    if form not in fast:
        said.append(f"{name}: plain torch (the definitions), {'as the recipe asks' if kind == 'plain' else place}")
        return plain
    words = {"fused": "fused kernels", "cpu": "plain torch with backward passes of its own"}[form]
    try:
        forms, error = fast[form](place)
    except FAULTS as fault:
        if kind == "fused":
            raise KernelError(
                f"kernels.{name}: fused does not run in {place} ({_words(fault)}); use 'auto' or 'plain'"
            ) from fault
        said.append(f"{name}: SLOW plain torch (the definitions); {words}: does not serve here, {_words(fault)}")
        return plain
    said.append(f"{name}: {words}, {place}, {_within(error)}")
    kernels.names[name] = "fused" if form == "fused" else "auto"  # the plan knows what auto means on a CPU
    return forms


def _fused_layers(place: Place) -> tuple[Layers, float]:
    from finetune.kernels.triton.loss import token_loss_sum_fused
    from finetune.kernels.triton.norm import rms_norm_fused
    from finetune.kernels.triton.residual_norm import residual_norm_fused
    from finetune.kernels.triton.router import route_fused
    from finetune.kernels.triton.swiglu import add_gated_fused, swiglu_fused

    forms = Layers(
        rms_norm_fused, residual_norm_fused, route_fused, swiglu_fused, add_gated_fused, token_loss_sum_fused
    )
    return forms, trial.layers(forms, Layers(), place)


def _fused_mixers(place: Place) -> tuple[Mixers, float]:
    from finetune.kernels.triton.attention import attend_documents, document_starts, gate_output_fused, prepare_fused
    from finetune.kernels.triton.delta_rule import gated_delta_rule
    from finetune.kernels.triton.deltanet import prepare_fused as prepare_delta_fused
    from finetune.kernels.triton.gated_norm import gated_norm_fused

    forms = Mixers(
        prepare_delta=prepare_delta_fused,
        rule=gated_delta_rule,
        gated_norm=gated_norm_fused,
        prepare_attention=prepare_fused,
        gate_output=gate_output_fused,
    )
    if place.device.type == "cuda" and place.dtype == torch.bfloat16:  # flash attention does not support float32
        forms = forms._replace(attend_packed=attend_documents, isolate=document_starts)
    return forms, trial.mixers(forms, Mixers(), place)


def _cpu_mixers(place: Place) -> tuple[Mixers, float]:
    return CPU_MIXERS, trial.mixers(CPU_MIXERS, Mixers(), place)


# Errors after which another form is tried: the kernel cannot be imported, compiled or launched (Triton's errors
# included), or its results differ from the definition.
FAULTS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)


def _words(fault: Exception) -> str:
    return f"{type(fault).__name__}: {(str(fault).splitlines() or ['no words'])[0]}"


def _within(error: float) -> str:
    return f"output and gradients checked here against the definition, within {error:.0e}"
