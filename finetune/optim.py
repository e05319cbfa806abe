"""Parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from finetune.model.deltanet import DECAY_RATES
from finetune.parallel.experts import is_marked
from finetune.recipe_sections import Optim

NOT_DECAYED = ("norm.weight", "embed_tokens.weight")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters as AdamW groups: matrices with decay; norms, decay rates, biases and embeddings without.

    Decay would pull the zero-centred norms to the identity, `linear_attn.norm` to zero, and the decay rates of DeltaNet
    to a fixed time scale. These have a group of their own, after others, since DeepSpeed wants one dtype in a group and
    takes the first group's for the model's. So have expert parameters, since DeepSpeed reduces them over other ranks.
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


def adamw(groups: list[dict[str, object]], optim: Optim, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over these groups, torch's own, so that nothing is compiled at start."""
    return torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
    )


def learning_rate(step: int, *, steps: int, optim: Optim) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Rises linearly to `lr` over the warm-up, which is cut to the run, then stays there or falls along half a cosine to
    final_lr_fraction x lr, which the last step reaches.
    """
    warmup = min(optim.warmup_steps, steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    lowest = optim.lr * optim.final_lr_fraction
    return lowest + (optim.lr - lowest) * 0.5 * (1 + math.cos(math.pi * done))
