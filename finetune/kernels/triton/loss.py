"""The language-model head and its cross entropy in one function, chunk by chunk; Triton.

The forward pass also computes the gradients, so that logits are neither stored for all tokens nor recomputed.

Definition: `finetune.model.head.token_loss_sum`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from finetune.model.head import IGNORED, supervised_rows

CHUNK_BYTES = 2**30  # largest chunk of logits


def token_loss_sum_fused(
    hidden: Float[Tensor, "batch time hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    labels: Int[Tensor, "batch time"],
    supervised: int | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Equivalent of `finetune.model.head.token_loss_sum`, with chunks of `CHUNK_BYTES`."""
    x, targets = supervised_rows(hidden, labels, supervised)
    return _LossSum.apply(x, weight, targets), (labels != IGNORED).sum()


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels):  # type: ignore[no-untyped-def]
        needs_x, needs_weight, _ = ctx.needs_input_grad
        vocabulary = len(weight)
        chunk = max(1, CHUNK_BYTES // (vocabulary * x.element_size()))
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if needs_weight else None
        for start in range(0, len(x), chunk):
            part = slice(start, min(start + chunk, len(x)))
            logits = x[part] @ weight.t()
            _cross_entropy_kernel[(len(logits),)](
                logits, labels[part], losses[part], vocabulary,
                GRADIENT=needs_x or needs_weight, BLOCK=min(8192, triton.next_power_of_2(vocabulary)), num_warps=16,
            )  # fmt: skip
            if d_x is not None:
                torch.mm(logits, weight, out=d_x[part])
            if d_weight is not None:
                d_weight += logits.t() @ x[part]
            del logits  # before the next chunk is allocated
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        d_x, d_weight = (None if d is None else d * gradient for d in ctx.saved_tensors)  # keeps the dtype of d
        return d_x, d_weight, None


@triton.jit
@no_type_check
def _cross_entropy_kernel(logits, labels, losses, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss of one row; with GRADIENT, the logits are overwritten by their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    at = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        value = tl.load(logits + start + at, mask=start + at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        # A lane without a finite value so far has the sum 0; -inf - -inf would make it NaN.
        total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(value - higher))
        top = higher
    highest = tl.max(top, 0)
    divisor = highest + tl.log(tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - highest)), 0))
    tl.store(losses + row, divisor - tl.load(logits + label).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        for start in range(0, vocabulary, BLOCK):
            mask = start + at < vocabulary
            value = tl.load(logits + start + at, mask=mask, other=float("-inf")).to(tl.float32)
            probability = tl.exp(value - divisor) - tl.where(start + at == label, 1.0, 0.0)
            tl.store(logits + start + at, probability.to(logits.dtype.element_ty), mask=mask)
