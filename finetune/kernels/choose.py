"""Which form of each computation a run uses: chosen once at start, tried on this device, and said aloud.

A fast form serves only if it runs here, forward and backward, at the model's own widths and dtype, and agrees there
with its definition (`trial.py`). What was chosen is put into the modules of `model/` as attributes, in place of the
definition that they start with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.kernels import trial
from finetune.kernels.experts import experts_grouped
from finetune.kernels.trial import Place
from finetune.model.head import token_loss_sum
from finetune.model.layers import RMSNorm, rms_norm
from finetune.model.model import HybridMoEForCausalLM
from finetune.model.moe import ExpertCompute, Experts, LocalCompute, MoE, Route, Router, experts_in_a_loop, route


class KernelError(ValueError):
    """A kernel that the recipe asks for by name cannot run on this device and dtype, or is wrong there."""


@dataclass
class Kernels:
    """The chosen form of every computation that has several; the definitions by default."""

    experts: ExpertCompute = experts_in_a_loop
    whole: LocalCompute | None = None  # experts between sort and sum, where one device holds all of them
    route: Route = route
    norm: Callable[..., Tensor] = rms_norm
    loss: Callable[..., tuple[Tensor, Tensor]] = token_loss_sum
    said: list[str] = field(default_factory=list)  # what was chosen and why, a sentence each


def choose(*, experts: str, layers: str, place: Place) -> Kernels:
    """The fastest forms that the recipe allows and that are right here.

    Args:
        experts: auto, fused, grouped or loop, as `kernels.experts` of the recipe says.
        layers: auto, fused or plain, as `kernels.layers` says.

    Raises:
        KernelError: a form was asked for by name and does not run here, or disagrees with its definition.
    """
    kernels = Kernels()
    _choose_experts(experts, place, kernels)
    _choose_layers(layers, place, kernels)
    return kernels


def install(model: HybridMoEForCausalLM, kernels: Kernels) -> None:
    """Make every module of the model compute by the chosen forms."""
    local = len(model.local_experts) == model.settings.num_experts
    model.loss = kernels.loss
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = kernels.experts
        elif isinstance(module, MoE):
            module.whole = kernels.whole if local else None
        elif isinstance(module, Router):
            module.compute = kernels.route
        elif isinstance(module, RMSNorm):
            module.compute = kernels.norm


def _choose_experts(kind: str, place: Place, kernels: Kernels) -> None:
    """Fused kernels on a GPU; elsewhere torch's grouped product; the loop only where nothing else runs."""
    if kind == "loop":
        kernels.said.append("experts: loop (the definition), as the recipe asks")
        return
    faults = []
    if kind == "fused" or (kind == "auto" and place.device.type == "cuda"):
        try:
            from finetune.kernels.fused_experts import experts_fused, moe_fused

            error = max(trial.experts(experts_fused, place), trial.whole(moe_fused, place))
            kernels.experts, kernels.whole = experts_fused, moe_fused
            kernels.said.append(f"experts: fused kernels, {place}, {_within(error)}")
            return
        except FAULTS as fault:
            faults.append(f"the fused kernels do not serve here: {_words(fault)}")
    if kind in ("auto", "grouped"):
        try:
            error = trial.experts(experts_grouped, place)
            kernels.experts = experts_grouped
            slower = f" SLOWER than on other GPUs, {faults[0]};" if faults else ""
            kernels.said.append(f"experts:{slower} grouped matrix product, {place}, {_within(error)}")
            return
        except FAULTS as fault:
            faults.append(f"the grouped product does not serve here: {_words(fault)}")
    if kind != "auto":
        raise KernelError(
            f"kernels.experts: {kind} does not run in {place} at widths {place.config.hidden_size} and"
            f" {place.config.moe_intermediate_size} with torch {torch.__version__} ({'; '.join(faults)});"
            " use 'auto' or 'loop'"
        )
    kernels.said.append(f"experts: SLOW loop over experts; {'; '.join(faults)}")


def _choose_layers(kind: str, place: Place, kernels: Kernels) -> None:
    """Norms, router and loss: in Triton on a GPU, in plain torch elsewhere."""
    if kind == "plain" or (kind == "auto" and place.device.type != "cuda"):
        why = "as the recipe asks" if kind == "plain" else f"{place}"
        kernels.said.append(f"layers: plain torch (the definitions), {why}")
        return
    try:
        from finetune.kernels.loss import token_loss_sum_fused
        from finetune.kernels.norm import rms_norm_fused
        from finetune.kernels.router import route_fused

        error = max(
            trial.norm(rms_norm_fused, rms_norm, place),
            trial.route(route_fused, route, place),
            trial.loss(token_loss_sum_fused, token_loss_sum, place),
        )
    except FAULTS as fault:
        if kind == "fused":
            raise KernelError(
                f"kernels.layers: fused does not run in {place} ({_words(fault)}); use 'auto' or 'plain'"
            ) from fault
        kernels.said.append(f"layers: SLOW plain torch; the fused kernels do not serve here: {_words(fault)}")
        return
    kernels.route, kernels.norm, kernels.loss = route_fused, rms_norm_fused, token_loss_sum_fused
    kernels.said.append(f"layers: fused norms, router and loss, {place}, {_within(error)}")


# What keeps a kernel from serving: it cannot be imported, compiled or launched (Triton's errors among them), or it
# gives something else than its definition.
FAULTS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)


def _words(fault: Exception) -> str:
    return f"{type(fault).__name__}: {(str(fault).splitlines() or ['no words'])[0]}"


def _within(error: float) -> str:
    return f"output and gradients checked here against the definition, within {error:.0e}"
