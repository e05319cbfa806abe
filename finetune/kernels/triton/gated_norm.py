"""Gated root-mean-square norm of a DeltaNet layer, in one pass forward and one backward; Triton.

The gate is read in place, from the grouped projection of the layer. Its gradient is written at the gate's position in a
buffer with the layout of the projection, which `deltanet.py` then completes.

Definition: `finetune.model.layers.gated_rms_norm`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

NUMBERS, WARPS = 1024, 2  # elements (rows x head dimension) and warps of a program; measured on an H100 at 128


def gated_norm_fused(
    x: Float[Tensor, "*batch heads dim"],
    gate: Float[Tensor, "*batch groups group_dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
) -> Float[Tensor, "*batch heads dim"]:
    """weight * x / rms(x) * silu(gate); the gate is read in place; its gradient gets the gate's strides if possible."""
    return _GatedNorm.apply(x, gate, weight, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps):  # type: ignore[no-untyped-def]
        x, gates = x.contiguous(), _as_groups(gate)
        out = torch.empty_like(x)
        rows, constants = _cut(x, gates)
        if count := x.numel() // x.shape[-1]:
            _norm_kernel[(triton.cdiv(count, rows),)](
                x, gates, weight, out, count, gates.stride(0), gates.stride(1), eps, **constants
            )
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, gate, weight = ctx.saved_tensors
        gates, d_x, d_gate = _as_groups(gate), torch.empty_like(x), _as_it_lies(gate)
        into = _as_groups(d_gate)
        rows, constants = _cut(x, gates)
        count = x.numel() // x.shape[-1]
        programs = triton.cdiv(count, rows)
        trains = ctx.needs_input_grad[2]
        parts = x.new_empty(programs, len(weight), dtype=torch.float32) if trains else None
        if count:
            _norm_backward_kernel[(programs,)](
                x, gates, weight, gradient.contiguous(), d_x, into, parts, count, gates.stride(0), gates.stride(1),
                into.stride(0), into.stride(1), ctx.eps, **constants,
            )  # fmt: skip
        return d_x, d_gate, parts.sum(0).to(weight.dtype) if parts is not None else None, None


def _as_groups(gate: Tensor) -> Tensor:
    """The gate as (tokens, groups, group_dim); not copied if one stride covers all tokens."""
    gates = gate.reshape(-1, *gate.shape[-2:])
    return gates if gates.stride(2) == 1 else gates.contiguous()


def _as_it_lies(gate: Tensor) -> Tensor:
    """Memory for the gate's gradient; with the gate's strides if the gate is the last part of each group."""
    groups, dim = gate.shape[-2:]
    tokens, width = gate.stride()[-3:-1]
    if not (gate.stride(-1) == 1 and width >= dim and tokens == groups * width):
        width = dim
    return gate.new_empty(*gate.shape[:-1], width)[..., width - dim :]


def _cut(x: Tensor, gates: Tensor) -> tuple[int, dict[str, int]]:
    heads, dim = x.shape[-2:]
    block = triton.next_power_of_2(dim)
    rows = max(1, NUMBERS // block)
    constants = {"HEADS": heads, "GROUP": heads // gates.shape[1], "DIM": dim, "ROWS": rows, "BLOCK": block}
    return rows, constants | {"num_warps": WARPS}


@no_type_check
@triton.jit
def _norm_inputs(
    x, gates, weight, row, at, mask, token_stride, group_stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x / rms(x), 1 / rms(x), the weight and the gate of these rows; a row is one head of one token."""
    place = row.to(tl.int64)[:, None] * DIM + at[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
    gate = tl.load(gates + _gate_place(row, at, token_stride, group_stride, HEADS, GROUP, DIM), mask=mask, other=0.0)
    gain = tl.load(weight + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]
    return value * scale, scale, gain, gate.to(tl.float32), place


@no_type_check
@triton.jit
def _gate_place(row, at, token_stride, group_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    head = row % HEADS
    first = (row // HEADS).to(tl.int64) * token_stride + (head // GROUP) * group_stride + (head % GROUP) * DIM
    return first[:, None] + at[None, :]


@no_type_check
@triton.jit
def _norm_kernel(
    x, gates, weight, out, rows, token_stride, group_stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (at < DIM)[None, :]
    normed, _, gain, gate, place = _norm_inputs(
        x, gates, weight, row, at, mask, token_stride, group_stride, eps, HEADS, GROUP, DIM
    )
    normed = gain * normed.to(x.dtype.element_ty).to(tl.float32)
    if x.dtype.element_ty == weight.dtype.element_ty:  # mixed dtypes: the product stays in float32
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (normed * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=mask)


@no_type_check
@triton.jit
def _norm_backward_kernel(
    x, gates, weight, gradient, d_x, d_gates, parts, rows, token_stride, group_stride,
    d_token_stride, d_group_stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (at < DIM)[None, :]
    normed, scale, gain, gate, place = _norm_inputs(
        x, gates, weight, row, at, mask, token_stride, group_stride, eps, HEADS, GROUP, DIM
    )
    given = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = given * gain * normed * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    into = _gate_place(row, at, d_token_stride, d_group_stride, HEADS, GROUP, DIM)
    tl.store(d_gates + into, d_gate.to(d_gates.dtype.element_ty), mask=mask)
    given *= gate * sigmoid
    if parts is not None:
        tl.store(parts + tl.program_id(0) * DIM + at, tl.sum(given * normed, 0), mask=at < DIM)
    given *= gain
    back = scale * (given - normed * (tl.sum(given * normed, 1) / DIM)[:, None])
    tl.store(d_x + place, back.to(d_x.dtype.element_ty), mask=mask)
