"""Optimizers, their parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distributed.expert_exchange import is_marked
from finetune.engine.eight_bit import adamw_8bit, initial_codes
from finetune.model.deltanet import DECAY_RATES
from finetune.recipe.sections import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW and Adam
NOT_DECAYED = ("norm.weight", "embed_tokens.weight")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group trainable parameters: matrices with weight decay; norms, decay rates, biases and embeddings without.

    Weight decay would pull the zero-centred norms to the identity, `linear_attn.norm` to zero, and the decay rates of
    DeltaNet to a fixed time scale. Decay rates have a separate group after the first, because DeepSpeed needs one dtype
    per group and takes the first group's as the model's. Expert parameters have a separate group, because DeepSpeed
    reduces them over other ranks.
    """
    sets: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "decay rates": [], "experts": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_marked(parameter):
            kind = "experts"
        elif name.endswith(DECAY_RATES):
            kind = "decay rates"
        else:
            kind = "plain" if name.endswith(NOT_DECAYED) else "decayed"
        sets[kind].append(parameter)
    return [
        {"name": kind, "params": parameters, "weight_decay": 0.0 if kind in ("plain", "decay rates") else weight_decay}
        for kind, parameters in sets.items()
        if parameters
    ]


def optimizer_of(groups: list[dict[str, object]], optim: Optim, *, fused: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer over these groups, of torch or bitsandbytes, so that nothing is compiled at start.

    AdamW: arXiv 1711.05101; Adam: 1412.6980; Adafactor: 1804.04235; 8 bits: 2110.02861.
    """
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=optim.lr)
    if optim.name == "adamw_8bit":
        return adamw_8bit(groups, optim)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def initial_state(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    like: Tensor,
    zeros: Callable[[Tensor], Tensor],
    experts: int = 0,
) -> dict[str, Any]:
    """What the optimizer keeps about a tensor of `group` before its first step, as it would make it in that step.

    Args:
        zeros: makes float32 zeros in the shape of its argument.
        experts: how many are stacked in the tensor; 0 if it is no expert's.
    """
    step = {"step": torch.tensor(0.0, device=like.device)}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": zeros(like)} if group["momentum"] else {}
    if isinstance(optimizer, torch.optim.Adafactor):
        if like.dim() < 2:
            return step | {"variance": zeros(like)}
        return step | {"row_var": zeros(like[..., :1]), "col_var": zeros(like[..., :1, :])}
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return step | {moment: zeros(like) for moment in MOMENTS}
    return initial_codes(optimizer, like, experts)


def warmup_of(optim: Optim, steps: int) -> int:
    """Number of warm-up steps in a run of `steps` steps, at most `steps`."""
    asked = math.ceil(optim.warmup_ratio * steps) if optim.warmup_ratio else optim.warmup_steps
    return min(asked, steps)


def learning_rate(step: int, *, steps: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step`, counted from 1, in a run of `steps` steps.

    With W warm-up steps and f = final_lr_fraction, as fractions of the peak:

        step <= W               step / W
        constant                1
        linear                  f + (1 - f) (1 - p)                   p = (step - W) / (steps - W)
        cosine                  f + (1 - f) (1 + cos(pi p)) / 2       p as for linear
        wsd                     f + (1 - f) (1 - p)                   p = max(0, step - (steps - D)) / D

    where wsd decays over the last D = decay_ratio x steps steps, rounded up, after the warm-up. Schedules of the same
    names in transformers give the same values (its linear with f = 0, its warmup_stable_decay with decay_type linear).
    """
    warmup = warmup_of(optim, steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule.startswith("constant"):
        return optim.lr
    falling = steps - warmup
    if optim.schedule == "wsd":
        falling = min(falling, math.ceil(optim.decay_ratio * steps))
    done = max(0, step - (steps - falling)) / falling
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    lowest = optim.lr * optim.final_lr_fraction
    return lowest + (optim.lr - lowest) * left
