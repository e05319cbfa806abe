"""The gated MLP's activation, and the gated sum of shared and routed experts, forward and backward; Triton.

Definitions: `finetune.model.layers.swiglu` and `add_gated`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from finetune.kernels.triton.norm import rows_of

BLOCK = 1024  # elements of a program of the activation kernels
PROGRAMS = 1024  # of a backward pass that needs the gate weight's gradient; each stores a partial sum


def swiglu_fused(gate: Float[Tensor, "*any width"], up: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """silu(gate) * up, computed in float32, returned in the dtype of `gate`."""
    return _SwiGLU.apply(gate, up)


def add_gated_fused(
    routed: Float[Tensor, "tokens hidden"] | None,
    shared: Float[Tensor, "tokens hidden"],
    x: Float[Tensor, "tokens hidden"],
    gate_weight: Float[Tensor, "1 hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """routed (or 0) + sigmoid(gate_weight x) * shared, computed in float32, returned in the dtype of `shared`."""
    return _AddGated.apply(routed, shared, x, gate_weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        rows, other = rows_of(gate), rows_of(up)
        if out.numel():
            _swiglu_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                rows, other, out, out.numel(), out.shape[-1], rows.stride(0), other.stride(0), BLOCK=BLOCK
            )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
        rows, other = rows_of(gate), rows_of(up)
        if gate.numel():
            _swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                rows, other, gradient.contiguous(), d_gate, d_up,
                gate.numel(), gate.shape[-1], rows.stride(0), other.stride(0), BLOCK=BLOCK,
            )  # fmt: skip
        return d_gate, d_up


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, routed, shared, x, gate_weight):  # type: ignore[no-untyped-def]
        shared, x = shared.contiguous(), x.contiguous()
        routed = None if routed is None else routed.contiguous()
        out = torch.empty_like(shared)
        tokens, hidden = shared.shape
        gate = torch.empty(tokens, dtype=torch.float32, device=x.device)
        if tokens:
            block = triton.next_power_of_2(hidden)
            _add_gated_kernel[(tokens,)](
                routed, shared, x, gate_weight, gate, out, hidden, BLOCK=block, num_warps=_warps(block)
            )
        trains = ctx.needs_input_grad[3]
        ctx.save_for_backward(shared, gate, gate_weight, x if trains else None)
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        shared, gate, gate_weight, x = ctx.saved_tensors
        tokens, hidden = shared.shape
        d_shared = torch.empty_like(shared)
        d_x = torch.empty_like(shared) if ctx.needs_input_grad[2] else None
        programs = tokens if x is None else min(PROGRAMS, tokens)
        parts = None if x is None else torch.zeros(programs, hidden, dtype=torch.float32, device=shared.device)
        if tokens:
            block = triton.next_power_of_2(hidden)
            _add_gated_backward_kernel[(programs,)](
                gradient.contiguous(), shared, x, gate_weight, gate, d_shared, d_x, parts, tokens, hidden,
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        d_weight = None if parts is None else parts.sum(0, keepdim=True).to(gate_weight.dtype)
        return gradient if ctx.needs_input_grad[0] else None, d_shared, d_x, d_weight


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))


@triton.jit
@no_type_check
def _swiglu_kernel(gate, up, out, size, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    row, column = at // width, at % width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _swiglu_backward_kernel(
    gate, up, gradient, d_gate, d_up, size, width, gate_stride, up_stride, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    row, column = at // width, at % width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(d_gate + at, (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + at, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _add_gated_kernel(routed, shared, x, gate_weight, gate, out, hidden, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < hidden
    place = token * hidden + at
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    factor = tl.sigmoid(tl.sum(value * tl.load(gate_weight + at, mask=mask, other=0.0).to(tl.float32), 0))
    tl.store(gate + token, factor)
    value = factor * tl.load(shared + place, mask=mask, other=0.0).to(tl.float32)
    if routed is not None:
        value += tl.load(routed + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _add_gated_backward_kernel(
    gradient, shared, x, gate_weight, gate, d_shared, d_x, parts, tokens, hidden, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    weight = tl.load(gate_weight + at, mask=at < hidden, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(tokens, tl.num_programs(0))):
        token = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        live = token < tokens
        mask = at < tl.where(live, hidden, 0)
        place = token * hidden + at
        given = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(gate + token, mask=live, other=0.0)
        tl.store(d_shared + place, (factor * given).to(d_shared.dtype.element_ty), mask=mask)
        given *= tl.load(shared + place, mask=mask, other=0.0).to(tl.float32)
        d_logit = tl.sum(given, 0) * factor * (1 - factor)
        if d_x is not None:
            tl.store(d_x + place, (d_logit * weight).to(d_x.dtype.element_ty), mask=mask)
        if parts is not None:
            summed += d_logit * tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if parts is not None:
        tl.store(parts + tl.program_id(0) * hidden + at, summed, mask=at < hidden)
