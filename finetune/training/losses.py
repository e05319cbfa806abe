"""Router losses. Pure functions of what the router said; nothing here knows about ranks.

Both are written as sums that add up: over micro-batches, over ranks, over anything the tokens of a step are divided
into. Divided by numbers counted over the whole step, the parts sum to the loss of the step, whatever the division.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def load_balance(
    logits: Float[Tensor, "tokens experts"],
    share: Float[Tensor, "groups experts"],
    group: Int[Tensor, " tokens"],
    step_tokens: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Penalty for sending many tokens to experts that are also given high probability; this batch's part of it.

    experts * sum over tokens t of sum_e f[g(t), e] p[t, e], divided by the tokens of the step. With f even it is this
    batch's share of 1 for the step; when one expert takes all it tends to its share of `experts`.
    (transformers' `load_balancing_loss_func` is top_k times this, and pools the layers.)

    Only p carries a gradient; f may be counted over more tokens than `logits` holds: over the whole step to balance the
    step (one group), over the micro-batch, or over each document (a group each).

    Args:
        share: f, the share of a group's rows that each expert received; rows sum to 1.
        group: which row of `share` each token is balanced within.
        step_tokens: tokens of the whole step, all ranks and micro-batches, padding excluded.

    Source: arXiv 2101.03961, eq. 4-6; counting over the whole step: arXiv 2501.11873.
    """
    probability = logits.softmax(-1)
    if share.shape[0] == 1:
        return logits.shape[-1] * (share[0] * probability.sum(0)).sum() / step_tokens
    sums = torch.zeros_like(share).index_add(0, group, probability)
    return logits.shape[-1] * (share * sums).sum() / step_tokens


def load_share(
    experts: Int[Tensor, "tokens top_k"], group: Int[Tensor, " tokens"], groups: int, num_experts: int
) -> Float[Tensor, "groups experts"]:
    """Share of each group's rows that every expert received, float32; a group without tokens has zeros."""
    slot = (group.unsqueeze(-1) * num_experts + experts).flatten()
    # Not bincount, which waits for a GPU to learn the largest value.
    counts = slot.new_zeros(groups * num_experts).scatter_add(0, slot, torch.ones_like(slot))
    counts = counts.view(groups, num_experts).float()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def router_z(logits: Float[Tensor, "tokens experts"], step_tokens: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Part of this batch in the mean over the step of (log sum exp logits)^2; keeps logits small.

    Source: arXiv 2202.08906, eq. 5.
    """
    return logits.logsumexp(-1).square().sum() / step_tokens
