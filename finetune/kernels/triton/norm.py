"""Root-mean-square norm in one pass over the rows, forward and backward; Triton.

Definition: `finetune.model.layers.rms_norm`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

PROGRAMS = 1024  # of the backward pass; each stores one partial sum of the weight's gradient


def rms_norm_fused(
    x: Float[Tensor, "*any dim"], weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*any dim"]:
    """x / rms(x) * (1 + weight), computed in float32, returned in the dtype of x."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        rows = rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rows.numel():
            block = triton.next_power_of_2(x.shape[-1])
            _forward_kernel[(len(rows),)](
                rows, weight, out, rows.shape[1], rows.stride(0), eps, BLOCK=block, num_warps=_warps(block)
            )
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, gradient = rows_of(x), rows_of(gradient)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        programs = min(PROGRAMS, len(rows))
        trains = ctx.needs_input_grad[1]
        parts = x.new_zeros(programs, rows.shape[1], dtype=torch.float32) if trains else None
        if rows.numel():
            block = triton.next_power_of_2(x.shape[-1])
            _backward_kernel[(programs,)](
                rows, weight, gradient, d_x, parts, len(rows), rows.shape[1], rows.stride(0), gradient.stride(0),
                ctx.eps, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        return d_x, parts.sum(0).to(weight.dtype) if parts is not None else None, None


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, dim); a slice of wider rows or heads is not copied if one stride covers all rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


@triton.jit
@no_type_check
def _forward_kernel(x, weight, out, dim, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < dim
    value = tl.load(x + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    gain = 1.0 + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * dim + at, (value * scale * gain).to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _backward_kernel(x, weight, gradient, d_x, parts, rows, dim, stride, gradient_stride, eps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < dim
    gain = 1.0 + tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(rows, tl.num_programs(0))):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        mask = at < tl.where(row < rows, dim, 0)
        value = tl.load(x + row * stride + at, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(gradient + row * gradient_stride + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
        normed = value * scale
        summed += given * normed
        given *= gain
        back = scale * (given - normed * (tl.sum(given * normed, 0) / dim))
        tl.store(d_x + row * dim + at, back.to(d_x.dtype.element_ty), mask=mask)
    if parts is not None:
        tl.store(parts + tl.program_id(0) * dim + at, summed, mask=at < dim)
