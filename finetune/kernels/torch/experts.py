"""Expert MLPs as two grouped matrix products, in place of a loop over experts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from finetune.model.moe import ExpertFactors, LowRank

ALIGNMENT_BYTES = 16  # required of every row that a grouped product reads


def experts_grouped(
    rows: Float[Tensor, "rows hidden"],
    rows_per_expert: Int[Tensor, " local_experts"],
    gate_up: Float[Tensor, "local_experts two_width hidden"],
    down: Float[Tensor, "local_experts hidden width"],
    factors: ExpertFactors | None = None,
) -> Float[Tensor, "rows hidden"]:
    """Equivalent of `experts_in_a_loop` by torch's grouped matrix product; no host synchronisation.

    `rows_per_expert` must sum to the number of rows: the product leaves rows beyond the last expert uninitialised.
    Factors of any rank are supported: they are zero-padded to the 16-byte rows that the product requires.
    """
    ends = rows_per_expert.cumsum(0).to(torch.int32)
    on_gate_up, on_down = factors or (None, None)
    gate, up = _product(rows, gate_up, on_gate_up, ends).chunk(2, dim=-1)
    return _ContiguousGradient.apply(_product(F.silu(gate) * up, down, on_down, ends))


def _product(
    rows: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "local_experts outputs inputs"],
    low_rank: LowRank | None,
    ends: Int[Tensor, " local_experts"],
) -> Float[Tensor, "rows outputs"]:
    """W_e x + B_e (scale * A_e x), without a temporary as large as W, forward or backward."""
    y = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    if low_rank is None:
        return y
    a, b = low_rank.a, low_rank.b
    if fill := -a.shape[1] % (ALIGNMENT_BYTES // rows.element_size()):
        a, b = F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    thin = low_rank.scale * F.grouped_mm(rows, a.transpose(-2, -1), offs=ends)
    return y + F.grouped_mm(thin, b.transpose(-2, -1), offs=ends)


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous, which the backward pass of the grouped product requires."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        # Without rows, `.contiguous()` would keep the strides of an expanded gradient.
        return gradient.contiguous() if gradient.numel() else gradient.new_empty(gradient.shape)
