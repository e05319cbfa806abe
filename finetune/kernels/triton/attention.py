"""Kernels before and after the attention operator, and attention of packed documents without a mask; Triton.

`prepare_fused`: norm and rotary embedding of queries and keys. `gate_output_fused`: the sigmoid gate on the output.
Queries and gates are interleaved in the output of `q_proj`, and so are their gradients. The backward pass of the gate
allocates memory for both and writes its own part; that of `prepare_fused` writes the rest, so neither is copied.

Definitions: `finetune.model.attention`.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from finetune.model.attention import Documents, Packing

ROWS = 16  # rows of a program; a row is one head of one token
WARPS = 8
# From torch 2.12 on, `varlen_attn` requires this argument for grouped keys.
GROUPED: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}


def prepare_fused(
    q_gate: Float[Tensor, "batch time queries_gates"],
    key: Float[Tensor, "batch time keys"],
    cos: Float[Tensor, "batch time rotary"],
    sin: Float[Tensor, "batch time rotary"],
    q_weight: Float[Tensor, " dim"],
    k_weight: Float[Tensor, " dim"],
    eps: float,
) -> tuple[
    Float[Tensor, "batch time heads dim"],
    Float[Tensor, "batch time kv_heads dim"],
    Float[Tensor, "batch time heads dim"],
]:
    """Queries and keys, normed and rotated in float32, stored in the input dtype; and the gates, a view of `q_gate`."""
    return _Prepare.apply(
        q_gate.contiguous(), key.contiguous(), cos.contiguous(), sin.contiguous(), q_weight, k_weight, eps
    )


def gate_output_fused(
    out: Float[Tensor, "batch time heads dim"], gate: Float[Tensor, "batch time heads dim"]
) -> Float[Tensor, "batch time hidden"]:
    """out * sigmoid(gate), computed in float32, returned in the dtype of `out`."""
    return _GateOutput.apply(out, gate)


def document_starts(packing: Packing) -> Documents:
    """Document boundaries for `attend_documents`; no host synchronisation, since their number is known."""
    ids = packing.segment_ids
    changes = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = torch.nonzero_static(changes.flatten(), size=packing.documents + 1, fill_value=ids.numel())
    return Documents(starts.squeeze(-1).to(torch.int32), packing.longest)


def attend_documents(
    query: Float[Tensor, "batch time heads dim"],
    key: Float[Tensor, "batch time kv_heads dim"],
    value: Float[Tensor, "batch time kv_heads dim"],
    isolation: Documents,
) -> Float[Tensor, "batch time heads dim"]:
    """Causal attention within documents by torch's variable-length flash attention; GPU only."""
    flat_query, flat_key, flat_value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    starts, longest = isolation
    out = varlen_attn(
        flat_query, flat_key, flat_value, starts, starts, longest, longest, window_size=(-1, 0), **GROUPED
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.view_as(query)


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_gate, key, cos, sin, q_weight, k_weight, eps):  # type: ignore[no-untyped-def]
        batch, time = q_gate.shape[:2]
        dim = len(q_weight)
        heads, kv_heads = q_gate.shape[2] // (2 * dim), key.shape[2] // dim
        query = torch.empty(batch, time, heads, dim, dtype=q_gate.dtype, device=key.device)
        key_out = torch.empty(batch, time, kv_heads, dim, dtype=key.dtype, device=key.device)
        sizes = batch * time, time, heads, kv_heads, dim, cos.shape[-1]
        if batch * time:
            _prepare_kernel[(_programs(*sizes),)](
                q_gate, key, cos, sin, q_weight, k_weight, query, key_out, *sizes, eps, **_tile(dim)
            )
        ctx.save_for_backward(q_gate, key, cos, sin, q_weight, k_weight)
        ctx.sizes, ctx.eps = sizes, eps
        ctx.set_materialize_grads(False)
        return query, key_out, q_gate.view(batch, time, heads, 2 * dim)[..., dim:]

    @staticmethod
    def backward(ctx, d_query, d_key, d_gate):  # type: ignore[no-untyped-def]
        q_gate, key, cos, sin, q_weight, k_weight = ctx.saved_tensors
        tokens, time, heads, kv_heads, dim, _ = ctx.sizes
        shape = q_gate.shape[0], time
        d_q_gate = _around(d_gate, q_gate, dim)
        d_key_in = torch.empty_like(key)
        d_query, d_key = _given(d_query, (*shape, heads, dim), key), _given(d_key, (*shape, kv_heads, dim), key)
        programs, of_query = _programs(*ctx.sizes), triton.cdiv(tokens * heads, ROWS)
        trains = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        parts = torch.empty(programs, dim, dtype=torch.float32, device=key.device) if trains else None
        if tokens:
            _prepare_backward_kernel[(programs,)](
                q_gate, key, cos, sin, q_weight, k_weight, d_query, d_key, d_q_gate, d_key_in, parts,
                *d_query.stride()[:3], *d_key.stride()[:3], *ctx.sizes, ctx.eps, **_tile(dim),
            )  # fmt: skip
        if parts is None:
            return d_q_gate, d_key_in, None, None, None, None, None
        d_q_weight, d_k_weight = parts[:of_query].sum(0), parts[of_query:].sum(0)
        return d_q_gate, d_key_in, None, None, d_q_weight.to(q_weight.dtype), d_k_weight.to(k_weight.dtype), None


class _GateOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, gate):  # type: ignore[no-untyped-def]
        batch, time, heads, dim = gate.shape
        gated = torch.empty(batch, time, heads * dim, dtype=out.dtype, device=out.device)
        out, gate = _given(out, gate.shape, gate), _given(gate, gate.shape, gate)
        ctx.sizes = batch * time * heads, time, heads, dim
        if gated.numel():
            _gate_kernel[(triton.cdiv(ctx.sizes[0], ROWS),)](
                out, gate, gated, *out.stride()[:3], *gate.stride()[:3], *ctx.sizes, **_tile(dim)
            )
        ctx.save_for_backward(out, gate)
        return gated

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        out, gate = ctx.saved_tensors
        dim = gate.shape[-1]
        d_out = torch.empty(gate.shape, dtype=out.dtype, device=out.device)
        d_gate = torch.empty(*gate.shape[:-1], 2 * dim, dtype=gate.dtype, device=gate.device)[..., dim:]
        if gradient.numel():
            _gate_backward_kernel[(triton.cdiv(ctx.sizes[0], ROWS),)](
                out, gate, gradient.contiguous(), d_out, d_gate,
                *out.stride()[:3], *gate.stride()[:3], *ctx.sizes, **_tile(dim),
            )  # fmt: skip
        return d_out, d_gate


def _around(d_gate: Tensor | None, q_gate: Tensor, dim: int) -> Tensor:
    """The gradient of `q_gate` with the part of the gates filled in; the part of the queries is uninitialised.

    If `d_gate` is the result of `_GateOutput.backward`, its memory, which has room for the queries, is reused.
    """
    if d_gate is None:
        return torch.zeros_like(q_gate)
    heads = q_gate.view(*d_gate.shape[:3], 2 * dim)
    if (
        d_gate.stride() == heads.stride()
        and d_gate.storage_offset() == dim
        and d_gate.untyped_storage().nbytes() == q_gate.numel() * q_gate.element_size()
    ):
        return d_gate.as_strided(q_gate.shape, q_gate.stride(), 0)
    whole = torch.empty_like(heads)  # the gate had another use, and autograd summed its gradients
    whole[..., dim:] = d_gate
    return whole.view_as(q_gate)


def _given(x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """x with a contiguous last dimension; zeros if there is no gradient."""
    if x is None:
        return like.new_zeros(shape)
    return x if x.stride(-1) == 1 else x.contiguous()


def _programs(tokens: int, time: int, heads: int, kv_heads: int, dim: int, rotary: int) -> int:
    return triton.cdiv(tokens * heads, ROWS) + triton.cdiv(tokens * kv_heads, ROWS)


def _tile(dim: int) -> dict[str, int]:
    return {"ROWS": ROWS, "DIM": triton.next_power_of_2(dim), "num_warps": WARPS}


@triton.jit
@no_type_check
def _places(first, at, time, heads, batch_stride, time_stride, head_stride, ROWS: tl.constexpr):
    """Offsets of the elements of these rows (one head of one token each), and the token of each row."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    token = row // heads
    start = token // time * batch_stride + token % time * time_stride + row % heads * head_stride
    return start[:, None] + at[None, :], token


@triton.jit
@no_type_check
def _turn(x, weight, cos, sin, out, first, row_stride, rows, heads, dim, rotary, eps, ROWS: tl.constexpr,
          DIM: tl.constexpr):  # fmt: skip
    """Norm these rows and rotate the first `rotary` dimensions of each."""
    row, at = first + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, DIM)
    mask = (row < rows)[:, None] & (at < dim)[None, :]
    turns = mask & (at < rotary)[None, :]
    half = rotary // 2
    other = tl.where(at < half, at + half, at - half)  # the dimension that forms a rotary pair with this one
    value = tl.load(x + row[:, None] * row_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
    aside = tl.load(x + row[:, None] * row_stride + other[None, :], mask=turns, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / dim + eps)[:, None]
    value *= scale * (1.0 + tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32))[None, :]
    aside *= scale * (1.0 + tl.load(weight + other, mask=at < rotary, other=0.0).to(tl.float32))[None, :]
    angle = (row // heads)[:, None] * rotary + at[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    value = value * c + tl.where(at < half, -1.0, 1.0)[None, :] * aside * s
    tl.store(out + row[:, None] * dim + at[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _prepare_kernel(
    q_gate, key, cos, sin, q_weight, k_weight, query_out, key_out, tokens, time, heads, kv_heads, dim, rotary, eps,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = tokens * heads
    of_query = tl.cdiv(rows, ROWS)
    if program < of_query:
        first = program * ROWS
        _turn(q_gate, q_weight, cos, sin, query_out, first, 2 * dim, rows, heads, dim, rotary, eps, ROWS, DIM)
    else:
        first, rows = (program - of_query) * ROWS, tokens * kv_heads
        _turn(key, k_weight, cos, sin, key_out, first, dim, rows, kv_heads, dim, rotary, eps, ROWS, DIM)


@triton.jit
@no_type_check
def _turn_back(x, weight, cos, sin, gradient, batch_stride, time_stride, head_stride, d_x, part, first, row_stride,
               rows, time, heads, dim, rotary, eps, ROWS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Store the input gradient of these rows, and their partial sum of the weight's gradient."""
    row, at = first + tl.arange(0, ROWS).to(tl.int64), tl.arange(0, DIM)
    live = row < rows
    mask = live[:, None] & (at < dim)[None, :]
    turns = mask & (at < rotary)[None, :]
    half = rotary // 2
    other = tl.where(at < half, at + half, at - half)
    place, token = _places(first, at, time, heads, batch_stride, time_stride, head_stride, ROWS)
    given = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    place, _ = _places(first, other, time, heads, batch_stride, time_stride, head_stride, ROWS)
    aside = tl.load(gradient + place, mask=turns, other=0.0).to(tl.float32)
    c = tl.load(cos + token[:, None] * rotary + at[None, :], mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + token[:, None] * rotary + other[None, :], mask=turns, other=0.0).to(tl.float32)
    given = given * c + tl.where(at < half, 1.0, -1.0)[None, :] * aside * s
    place = row[:, None] * row_stride + at[None, :]
    normed = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(normed * normed, axis=1) / dim + eps)[:, None]
    normed *= scale
    if part is not None:
        tl.store(part + at, tl.sum(given * normed, axis=0), mask=at < dim)
    given *= 1.0 + tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)[None, :]
    back = scale * (given - normed * (tl.sum(given * normed, axis=1) / dim)[:, None])
    tl.store(d_x + place, back.to(d_x.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _prepare_backward_kernel(
    q_gate, key, cos, sin, q_weight, k_weight, d_query, d_key, d_q_gate, d_key_in, parts,
    q_batch, q_time, q_head, k_batch, k_time, k_head, tokens, time, heads, kv_heads, dim, rotary, eps,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = parts
    if parts is not None:
        part = parts + program * dim
    rows = tokens * heads
    of_query = tl.cdiv(rows, ROWS)
    if program < of_query:
        _turn_back(q_gate, q_weight, cos, sin, d_query, q_batch, q_time, q_head, d_q_gate, part, program * ROWS,
                   2 * dim, rows, time, heads, dim, rotary, eps, ROWS, DIM)  # fmt: skip
    else:
        _turn_back(key, k_weight, cos, sin, d_key, k_batch, k_time, k_head, d_key_in, part,
                   (program - of_query) * ROWS, dim, tokens * kv_heads, time, kv_heads, dim, rotary, eps, ROWS,
                   DIM)  # fmt: skip


@triton.jit
@no_type_check
def _gate_kernel(
    out, gate, gated, o_batch, o_time, o_head, g_batch, g_time, g_head, rows, time, heads, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, at = first + tl.arange(0, ROWS), tl.arange(0, DIM)
    live = row < rows
    mask = live[:, None] & (at < dim)[None, :]
    place, _ = _places(first, at, time, heads, o_batch, o_time, o_head, ROWS)
    value = tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    place, _ = _places(first, at, time, heads, g_batch, g_time, g_head, ROWS)
    opening = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * dim + at[None, :]
    tl.store(gated + place, (value * tl.sigmoid(opening)).to(gated.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _gate_backward_kernel(
    out, gate, gradient, d_out, d_gate, o_batch, o_time, o_head, g_batch, g_time, g_head, rows, time, heads, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, at = first + tl.arange(0, ROWS), tl.arange(0, DIM)
    live = row < rows
    mask = live[:, None] & (at < dim)[None, :]
    place, _ = _places(first, at, time, heads, o_batch, o_time, o_head, ROWS)
    value = tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    place, _ = _places(first, at, time, heads, g_batch, g_time, g_head, ROWS)
    sigmoid = tl.sigmoid(tl.load(gate + place, mask=mask, other=0.0).to(tl.float32))
    place = row[:, None] * dim + at[None, :]
    given = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_out + place, (given * sigmoid).to(d_out.dtype.element_ty), mask=mask)
    d_opening = given * value * sigmoid * (1 - sigmoid)
    place = row[:, None] * (2 * dim) + at[None, :]
    tl.store(d_gate + place, d_opening.to(d_gate.dtype.element_ty), mask=mask)
