"""Residual addition and the following root-mean-square norm in one pass over the rows, forward and backward; Triton.

Forward reads two tensors and writes two; backward reads three and writes one. Definition:
`finetune.model.layers.residual_norm`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

PROGRAMS = 1024  # of a backward pass that needs the weight's gradient; each stores a partial sum


def residual_norm_fused(
    x: Float[Tensor, "*any dim"], delta: Float[Tensor, "*any dim"], weight: Float[Tensor, " dim"], eps: float
) -> tuple[Float[Tensor, "*any dim"], Float[Tensor, "*any dim"]]:
    """x + delta, and the norm of that sum after its rounding to the dtype of x."""
    return _ResidualNorm.apply(x, delta, weight, eps)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):  # type: ignore[no-untyped-def]
        x, delta = x.contiguous(), delta.contiguous()
        total, normed = torch.empty_like(x), torch.empty_like(x)
        dim = x.shape[-1]
        if x.numel():
            block = triton.next_power_of_2(dim)
            _forward_kernel[(x.numel() // dim,)](
                x, delta, weight, total, normed, dim, eps, BLOCK=block, num_warps=_warps(block)
            )
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx, d_total, d_normed):  # type: ignore[no-untyped-def]
        if d_normed is None:
            return d_total, d_total, None, None
        total, weight = ctx.saved_tensors
        dim = total.shape[-1]
        rows = total.numel() // dim
        d_x = torch.empty_like(total)
        trains = ctx.needs_input_grad[2]
        programs = min(PROGRAMS, rows) if trains else rows
        parts = torch.zeros(programs, dim, dtype=torch.float32, device=total.device) if trains else None
        if rows:
            block = triton.next_power_of_2(dim)
            _backward_kernel[(programs,)](
                total, weight, None if d_total is None else d_total.contiguous(), d_normed.contiguous(), d_x, parts,
                rows, dim, ctx.eps, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        return d_x, d_x, parts.sum(0).to(weight.dtype) if parts is not None else None, None


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))


@triton.jit
@no_type_check
def _forward_kernel(x, delta, weight, total, normed, dim, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < dim
    place = tl.program_id(0).to(tl.int64) * dim + at
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)
    stored = value.to(total.dtype.element_ty)
    tl.store(total + place, stored, mask=mask)
    value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    gain = 1.0 + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, (value * scale * gain).to(normed.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _backward_kernel(total, weight, d_total, d_normed, d_x, parts, rows, dim, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    gain = 1.0 + tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(rows, tl.num_programs(0))):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        mask = at < tl.where(row < rows, dim, 0)
        place = row * dim + at
        value = tl.load(total + place, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(d_normed + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
        value *= scale
        if parts is not None:
            summed += given * value
        given *= gain
        back = scale * (given - value * (tl.sum(given * value, 0) / dim))
        if d_total is not None:
            back += tl.load(d_total + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + place, back.to(d_x.dtype.element_ty), mask=mask)
    if parts is not None:
        tl.store(parts + tl.program_id(0) * dim + at, summed, mask=at < dim)
