"""The grouped matrix products of gated experts with their fused operations, and the sum over a token's rows; Triton.

`tiles.py` defines the tiles and how they are read. `fused_experts.py` combines the products.
"""

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.triton.tiles import (
    Rows,
    add_thin,
    constants,
    left_operand,
    pair_operand,
    pair_tile,
    right_operand,
    row_tile,
    sizes_of,
    strides,
    tile_place,
    weight_tile,
)


def up_product(
    x: Tensor, gate_up: Tensor, rows: Rows, thin: Tensor | None, factor: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up of every row; and with `keep` the pre-activations, gate | up, (rows, 2 x width)."""
    width, depth = gate_up.shape[1] // 2, x.shape[1]
    act = x.new_empty(rows.rows, width)
    pre = x.new_empty(rows.rows, 2 * width) if keep else None
    if not rows.rows:
        return act, pre
    sizes = sizes_of("up", x.dtype, columns=width)
    left, left_half, of = left_operand(x, rows, sizes, gathered=True)
    right, by = pair_operand(gate_up, sizes)
    _up_kernel[(len(rows.tiles) * triton.cdiv(width, sizes.columns),)](
        left, left_half, right, act, pre, thin, factor, rows.slot, rows.tiles,
        depth, width, rows.top_k, *gate_up.stride(), *strides(factor),
        OF=of, BY=by, **constants(sizes, depth, thin),
    )  # fmt: skip
    return act, pre


def up_backward(
    gradient: Tensor, down: Tensor, pre: Tensor, rows: Rows, weights: Tensor | None,
    thin: Tensor | None, factor: Tensor | None, *, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of gate and up, and of the routing weights; with `keep` also routing weight x activation of every row.

    The first overwrites `pre`. Its version counter is incremented, so torch refuses a second backward pass.
    """
    _, depth, width = down.shape
    torch.autograd.graph.increment_version(pre)
    sizes = sizes_of("up_backward", pre.dtype, columns=width)
    blocks = triton.cdiv(width, sizes.columns)
    act = pre.new_empty(rows.rows, width) if keep else None
    parts = None if weights is None else gradient.new_empty(rows.rows, blocks, dtype=torch.float32)
    if rows.rows:
        factor = None if factor is None else factor.transpose(1, 2)
        left, left_half, of = left_operand(gradient, rows, sizes, gathered=True)
        right, by = right_operand(down.transpose(1, 2), sizes)
        _up_backward_kernel[(len(rows.tiles) * blocks,)](
            left, left_half, right, pre, act, parts, weights, thin, factor,
            rows.slot, rows.tiles, depth, width, rows.top_k, *down.transpose(1, 2).stride(), *strides(factor),
            OF=of, BY=by, **constants(sizes, depth, thin),
        )  # fmt: skip
    d_weights = None if parts is None or weights is None else parts.sum(1).view_as(weights).to(weights.dtype)
    return pre, d_weights, act


def grouped_product(
    x: Tensor, weight: Tensor, rows: Rows, *, gathered: bool = False, scatter: bool = False, scale: float = 1.0,
    thin: Tensor | None = None, factor: Tensor | None = None, weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scale * (x_r W_e^T + thin_r factor_e^T) for every sorted row r and its expert e, times the routing weight.

    Args:
        x: (rows, depth), or with `gathered` (tokens, depth).
        weight: (experts, columns, depth) with any strides.
        scatter: store each row at its slot instead of its sorted position.
        thin: (rows, rank), a low-rank product; None for none. `factor` is its (experts, columns, rank) counterpart.
        weights: routing weights by slot; None for none.
    """
    _, columns, depth = weight.shape
    out = x.new_empty(rows.rows, columns)
    if not rows.rows:
        return out
    sizes = sizes_of("grouped", x.dtype, columns=columns)
    left, left_half, of = left_operand(x, rows, sizes, gathered=gathered)
    right, by = right_operand(weight, sizes)
    _grouped_kernel[(len(rows.tiles) * triton.cdiv(columns, sizes.columns),)](
        left, left_half, right, out, thin, factor, weights, rows.slot, rows.tiles,
        depth, columns, rows.top_k, scale, *weight.stride(), *strides(factor),
        SCATTER=scatter and rows.slot is not None, OF=of, BY=by, **constants(sizes, depth, thin),
    )  # fmt: skip
    return out


def combine(slots: Tensor, rows: Rows, addend: Tensor | None) -> Tensor:
    """addend + the sum over each token's `top_k` adjacent rows."""
    if rows.slot is None:
        return slots
    hidden = slots.shape[1]
    out = slots.new_empty(rows.rows // rows.top_k, hidden)
    if len(out):
        block = min(2048, triton.next_power_of_2(hidden))
        grid = (len(out), triton.cdiv(hidden, block))
        addend = None if addend is None else addend.contiguous()
        _combine_kernel[grid](slots, addend, out, hidden, TOP_K=rows.top_k, BLOCK=block, num_warps=4)
    return out


def weight_gradient(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """left^T right summed over each expert's rows, (experts, left columns, right columns); torch's grouped product."""
    ends, shape = rows.starts[1:].to(torch.int32), (left.shape[1], right.shape[1])
    left, right = _whole_words(left), _whole_words(right)
    return F.grouped_mm(left.t(), right, offs=ends)[:, : shape[0], : shape[1]]


def _whole_words(x: Tensor) -> Tensor:
    """x, zero-padded to rows of a multiple of 16 bytes, which torch's grouped product requires."""
    fill = -x.shape[1] % (16 // x.element_size())
    return F.pad(x, (0, fill)) if fill else x


@triton.jit
@no_type_check
def _up_kernel(
    x, x_half, gate_up, act, pre, thin, factor, slot, tiles,
    depth, width, top_k, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
    OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    expert, start, first, end = tile_place(tiles, width, BN)
    if first < end:
        if end - first > BM // 2:
            _up_tile(x, gate_up, act, pre, thin, factor, slot, expert, start, first, end, depth, width, top_k,
                     e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
                     OF, BY, BM, BN, BK, EVEN, RANK, RANKS)  # fmt: skip
        else:
            _up_tile(x_half, gate_up, act, pre, thin, factor, slot, expert, start, first, end, depth, width, top_k,
                     e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
                     OF, BY, BM // 2, BN, BK, EVEN, RANK, RANKS)  # fmt: skip


@triton.jit
@no_type_check
def _up_tile(
    x, gate_up, act, pre, thin, factor, slot, expert, start, first, end, depth, width, top_k,
    e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride, OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    row = tl.minimum(row, end - 1)
    source = row
    if OF == "tokens":
        source = tl.load(slot + row) // top_k
    both = tl.zeros((BM, 2 * BN), tl.float32)
    for k in range(0, depth, BK):
        rows = row_tile(x, source, first, k, depth, BK, EVEN, OF)
        right = pair_tile(gate_up, expert, start, k, width, depth, e_stride, n_stride, k_stride, BN, BK, EVEN, BY)
        both = tl.dot(rows, right, both, input_precision="ieee")
    gate, up = _halves(both, BM, 2 * BN)
    column = start + tl.arange(0, BN)
    if RANK:
        inside = column % width
        gate = add_thin(gate, thin, factor, row, expert, inside, fe_stride, fn_stride, fr_stride, RANK, RANKS)
        up = add_thin(up, thin, factor, row, expert, width + inside, fe_stride, fn_stride, fr_stride, RANK, RANKS)
    mask = live[:, None] & (column < width)[None, :]
    if pre is not None:
        kept = pre + row[:, None] * (2 * width) + column[None, :]
        tl.store(kept, gate.to(pre.dtype.element_ty), mask=mask)
        tl.store(kept + width, up.to(pre.dtype.element_ty), mask=mask)
    out = gate * tl.sigmoid(gate) * up
    tl.store(act + row[:, None] * width + column[None, :], out.to(act.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _up_backward_kernel(
    gradient, gradient_half, down, pre, act, parts, weights, thin, factor, slot, tiles,
    depth, width, top_k, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
    OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    expert, start, first, end = tile_place(tiles, width, BN)
    if first < end:
        if end - first > BM // 2:
            _up_backward_tile(gradient, down, pre, act, parts, weights, thin, factor, slot, expert, start,
                              first, end, depth, width, top_k, e_stride, n_stride, k_stride, fe_stride, fn_stride,
                              fr_stride, OF, BY, BM, BN, BK, EVEN, RANK, RANKS)  # fmt: skip
        else:
            _up_backward_tile(gradient_half, down, pre, act, parts, weights, thin, factor, slot, expert, start,
                              first, end, depth, width, top_k, e_stride, n_stride, k_stride, fe_stride, fn_stride,
                              fr_stride, OF, BY, BM // 2, BN, BK, EVEN, RANK, RANKS)  # fmt: skip


@triton.jit
@no_type_check
def _up_backward_tile(
    gradient, down, pre, act, parts, weights, thin, factor, slot, expert, start, first, end, depth, width,
    top_k, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride, OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    row = tl.minimum(row, end - 1)
    at_slot = row
    if slot is not None:
        at_slot = tl.load(slot + row)
    source = at_slot // top_k if OF == "tokens" else row
    d_act = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        rows = row_tile(gradient, source, first, k, depth, BK, EVEN, OF)
        right = weight_tile(down, expert, start, k, width, depth, e_stride, n_stride, k_stride, BN, BK, EVEN, BY)
        d_act = tl.dot(rows, right, d_act, input_precision="ieee")
    column = start + tl.arange(0, BN)
    if RANK:
        inside = column % width
        d_act = add_thin(d_act, thin, factor, row, expert, inside, fe_stride, fn_stride, fr_stride, RANK, RANKS)

    weight = tl.full((BM,), 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + at_slot).to(tl.float32)
    # By pieces of columns: the whole tile with gate and up would exceed the registers.
    if BN >= 128:
        left, right = _halves(d_act, BM, BN)
        share = _swiglu_backward(left, start, 0, row, live, weight, pre, act, width, BM, BN // 2)
        share += _swiglu_backward(right, start, BN // 2, row, live, weight, pre, act, width, BM, BN // 2)
    else:
        share = _swiglu_backward(d_act, start, 0, row, live, weight, pre, act, width, BM, BN)
    if weights is not None:
        tl.store(parts + at_slot * tl.cdiv(width, BN) + start // BN, share, mask=live)


@triton.jit
@no_type_check
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right halves of the columns."""
    return x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
@no_type_check
def _swiglu_backward(d_act, start, offset, row, live, weight, pre, act, width, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    """Overwrite gate and up of some columns by their gradients; return the part of the routing weights' gradient."""
    if BN >= 128:
        left, right = _halves(d_act, BM, BN)
        share = _swiglu_backward(left, start, offset, row, live, weight, pre, act, width, BM, BN // 2)
        share += _swiglu_backward(right, start, offset + BN // 2, row, live, weight, pre, act, width, BM, BN // 2)
    else:
        column = start + offset + tl.arange(0, BN)
        mask = live[:, None] & (column < width)[None, :]
        kept = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(pre + kept, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre + kept + width, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        share = tl.sum(d_act * silu * up, axis=1)
        if act is not None:
            weighted = weight[:, None] * silu * up
            tl.store(act + row[:, None] * width + column[None, :], weighted.to(act.dtype.element_ty), mask=mask)
        d_act *= weight[:, None]
        d_gate = d_act * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(pre + kept, d_gate.to(pre.dtype.element_ty), mask=mask)
        tl.store(pre + kept + width, (d_act * silu).to(pre.dtype.element_ty), mask=mask)
    return share


@triton.jit
@no_type_check
def _grouped_kernel(
    x, x_half, weight, out, thin, factor, weights, slot, tiles,
    depth, columns, top_k, scale, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
    SCATTER: tl.constexpr, OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    expert, start, first, end = tile_place(tiles, columns, BN)
    if first < end:
        if end - first > BM // 2:
            _grouped_tile(x, weight, out, thin, factor, weights, slot, expert, start, first, end, depth, columns,
                          top_k, scale, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
                          SCATTER, OF, BY, BM, BN, BK, EVEN, RANK, RANKS)  # fmt: skip
        else:
            _grouped_tile(x_half, weight, out, thin, factor, weights, slot, expert, start, first, end, depth, columns,
                          top_k, scale, e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
                          SCATTER, OF, BY, BM // 2, BN, BK, EVEN, RANK, RANKS)  # fmt: skip


@triton.jit
@no_type_check
def _grouped_tile(
    x, weight, out, thin, factor, weights, slot, expert, start, first, end, depth, columns, top_k, scale,
    e_stride, n_stride, k_stride, fe_stride, fn_stride, fr_stride,
    SCATTER: tl.constexpr, OF: tl.constexpr, BY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BM)
    live = row < end
    row = tl.minimum(row, end - 1)
    at_slot = row
    if slot is not None:
        at_slot = tl.load(slot + row)
    source = at_slot // top_k if OF == "tokens" else row
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        rows = row_tile(x, source, first, k, depth, BK, EVEN, OF)
        right = weight_tile(weight, expert, start, k, columns, depth, e_stride, n_stride, k_stride, BN, BK, EVEN, BY)
        acc = tl.dot(rows, right, acc, input_precision="ieee")
    column = start + tl.arange(0, BN)
    if RANK:
        inside = column % columns
        acc = add_thin(acc, thin, factor, row, expert, inside, fe_stride, fn_stride, fr_stride, RANK, RANKS)
    if weights is not None:
        acc *= tl.load(weights + at_slot).to(tl.float32)[:, None]
    target = at_slot if SCATTER else row
    place = out + target[:, None] * columns + column[None, :]
    tl.store(place, (scale * acc).to(out.dtype.element_ty), mask=live[:, None] & (column < columns)[None, :])


@triton.jit
@no_type_check
def _combine_kernel(slots, addend, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    acc = tl.zeros((BLOCK,), tl.float32)
    if addend is not None:
        acc += tl.load(addend + token * hidden + column, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        acc += tl.load(slots + (token * TOP_K + choice) * hidden + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, acc.to(out.dtype.element_ty), mask=mask)
