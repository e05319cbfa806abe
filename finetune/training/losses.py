"""Router losses: pure functions of the router's logits and choices, without communication.

Each function returns a sum over its tokens, divided by the token count of the whole step. The results of all
micro-batches and ranks therefore add up to the loss of the step, however its tokens are partitioned.
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
    """Load-balancing loss of one layer: the part of this batch.

    experts * sum over tokens t of sum_e f[g(t), e] p[t, e], divided by the tokens of the step. Summed over the step it
    is 1 for even load and approaches `experts` when one expert receives all tokens.
    (transformers' `load_balancing_loss_func` is top_k times this, and pools the layers.)

    Only p, the softmax of `logits`, carries a gradient. f may be counted over more tokens than `logits` holds: over the
    whole step or the micro-batch (one group), or over each document (one group per document).

    Args:
        share: f, the share of a group's rows that each expert received; each group sums to 1.
        group: index into `share` of each token's group.
        step_tokens: tokens of the whole step over all ranks and micro-batches, padding excluded.

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
    """Share of each group's rows that every expert received, float32; zeros for a group without tokens."""
    slot = (group.unsqueeze(-1) * num_experts + experts).flatten()
    # bincount would synchronise with the GPU to read the largest value.
    counts = slot.new_zeros(groups * num_experts).scatter_add(0, slot, torch.ones_like(slot))
    counts = counts.view(groups, num_experts).float()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def router_z(logits: Float[Tensor, "tokens experts"], step_tokens: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Router z-loss, the mean over the step of (log sum exp logits)^2: the part of this batch. Keeps logits small.

    Source: arXiv 2202.08906, eq. 5.
    """
    return logits.logsumexp(-1).square().sum() / step_tokens
