"""Memory of one rank for a micro-batch, in addition to weights and optimizer state. Imports no torch."""

from collections.abc import Sequence

from finetune.model.config import Recompute
from finetune.plan import activations
from finetune.plan.activations import Setting
from finetune.plan.adapter_targets import meant_targets
from finetune.plan.workload import GIB, Workload

# Per rank: CUDA, NCCL and libraries on a GPU; Python and its libraries on the host.
RUNTIME_DEVICE_BYTES = 3 * GIB // 2
RUNTIME_HOST_BYTES = GIB
UNEVEN_LOAD = 0.5  # rows above the mean, as a fraction of it, that `train.recompute: auto` leaves room for


def setting(work: Workload) -> Setting:
    """What the saved tensors of this run depend on."""
    recipe, lora, kernels = work.recipe, work.recipe.lora, work.recipe.kernels
    on_gpu = work.machine.device_bytes is not None
    fused_experts, fused_layers, fused_mixers = (
        kind == "fused" or (kind == "auto" and on_gpu) for kind in (kernels.experts, kernels.layers, kernels.mixers)
    )
    flash = fused_mixers and on_gpu and work.weight_bytes == 2  # flash attention isolates documents without a mask
    return Setting(
        weight_bytes=work.weight_bytes,
        full_parameter=lora is None,
        sequence_tokens=recipe.train.sequence_tokens,
        masked=recipe.data.packing == "packed" and not flash,
        expert_adapter_rank=lora.rank if lora is not None and "experts" in lora.targets else 0,
        router_losses=recipe.router.balance.coefficient > 0 or recipe.router.z_coefficient > 0,
        exchanged=recipe.parallel.expert > 1,
        dropped=meant_targets(work.config, lora) if lora is not None and lora.dropout > 0 else (),
        on_gpu=on_gpu,
        fused_experts=fused_experts,
        fused_layers=fused_layers,
        fused_mixers=fused_mixers,
        cpu_mixers=kernels.mixers == "auto" and not on_gpu,
    )


def on_rank(work: Workload, recompute: Sequence[Recompute]) -> dict[str, int]:
    """Bytes that one micro-batch needs at the peak of the backward pass, by component.

    The backward pass visits the layers from the last to the first. Each layer needs all its saved tensors, stored or
    recomputed, and the stored tensors of the layers before it; those of later layers are already freed.
    """
    config, how, tokens = work.config, setting(work), work.recipe.train.micro_batch_tokens
    between = held = turn = before = 0.0
    for size, again in zip(activations.sizes(config, how), recompute, strict=True):
        between += size.between
        # If both halves are recomputed together, the mixer's tensors exist during the backward pass of the experts.
        mixer = size.mixer if again.experts or not again.mixer else 0.0
        now = max(mixer + size.experts + size.experts_gradients, size.mixer + size.mixer_gradients)
        if before + now > held + turn:
            held, turn = before, now
        before += size.mixer * (not again.mixer) + size.experts * (not again.experts)
        if again.experts and not again.mixer:  # the stored input of the experts half
            before += config.hidden_size * how.weight_bytes
    # The backward pass of the head comes first, when all stored tensors still exist.
    logits = activations.loss_bytes(config, tokens, how) - int(tokens * (held + turn - before))
    return {
        "kept between layers": int(tokens * between),
        "saved in the layers before": int(tokens * held),
        "the layer that needs most, and its gradients": int(tokens * turn),
        "rows on their way between ranks": tokens * _travelling(work),  # and with even load received
        "logits and their gradient, beyond these": max(0, logits),
        "runtime": RUNTIME_HOST_BYTES if work.machine.device_bytes is None else RUNTIME_DEVICE_BYTES,
    }


def uneven_load(work: Workload, recompute: Sequence[Recompute]) -> int:
    """Bytes that a rank may need beyond the plan because its experts receive more rows than the mean."""
    config, how = work.config, setting(work)
    if not how.exchanged:
        return 0  # every rank holds all experts and processes its own tokens
    sizes = activations.sizes(config, how)
    held = sum(size.experts for size, again in zip(sizes, recompute, strict=True) if not again.experts)
    turn = max(size.experts + size.experts_gradients for size in sizes) + _travelling(work)
    return int(UNEVEN_LOAD * work.recipe.train.micro_batch_tokens * (held + turn))


def _travelling(work: Workload) -> int:
    """Bytes per token of exchange buffers: rows dispatched and combined, and the gradients of both."""
    if work.recipe.parallel.expert == 1:
        return 0
    return 4 * work.config.num_experts_per_tok * work.config.hidden_size * work.weight_bytes
