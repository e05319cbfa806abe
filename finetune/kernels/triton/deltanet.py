"""Gated DeltaNet between its projections and the delta rule, in one pass forward and one backward; Triton.

The grouped projection is read in place; the results of convolution, SiLU and L2 norm stay in registers. Only the
projections are saved for the backward pass, which recomputes the rest. It writes the projection's gradient once, in the
grouped layout, into the memory that `gated_norm_fused` allocated and already filled with the gate's part.

Documents are isolated bit for bit: the convolution of a token loads nothing from before its document.

Definition: `finetune.model.deltanet.prepare`.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from finetune.model.deltanet import Heads, Prepared

# Elements (rows x head dimension) and warps of a program; measured on an H100 at head dimension 128.
NUMBERS, WARPS = 1024, 2
BACKWARD_NUMBERS, BACKWARD_WARPS = 512, 4
STEPS = 32  # tokens that a row of `_prepare_backward_kernel` processes, last first
DECAY_ROWS = 32  # tokens of a program of the decay kernels


def prepare_fused(
    qkvz: Float[Tensor, "batch time grouped"],
    ba: Float[Tensor, "batch time grouped_heads"],
    conv_weight: Float[Tensor, "channels width"],
    log_rate: Float[Tensor, " value_heads"],
    bias: Float[Tensor, " value_heads"],
    segment_ids: Int[Tensor, "batch time"],
    heads: Heads,
) -> Prepared:
    """Equivalent of `finetune.model.deltanet.prepare`: convolution, SiLU, L2 norm; decays and write strengths."""
    query, key, value, gate = _Prepare.apply(qkvz, conv_weight, segment_ids, heads)
    log_decay, write = _Decay.apply(ba, log_rate, bias, heads)
    return Prepared(query, key, value, log_decay, write, gate)


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvz, conv_weight, segment_ids, heads):  # type: ignore[no-untyped-def]
        qkvz, conv_weight, segment_ids = qkvz.contiguous(), conv_weight.contiguous(), segment_ids.contiguous()
        batch, time = segment_ids.shape
        query = qkvz.new_empty(batch, time, heads.keys, heads.key_dim)
        key = qkvz.new_empty(batch, time, heads.keys, heads.key_dim)
        value = qkvz.new_empty(batch, time, heads.values, heads.value_dim)
        rows, constants = _cut(heads, conv_weight, NUMBERS, WARPS)
        if tokens := batch * time:
            _prepare_kernel[(2 * heads.keys + heads.values, triton.cdiv(tokens, rows))](
                qkvz, conv_weight, segment_ids, query, key, value, tokens, time, **constants
            )
        ctx.save_for_backward(qkvz, conv_weight, segment_ids)
        ctx.heads = heads
        grouped = qkvz.unflatten(-1, (heads.keys, -1))
        return query, key, value, grouped[..., -(heads.values // heads.keys) * heads.value_dim :]

    @staticmethod
    def backward(ctx, d_query, d_key, d_value, d_gate):  # type: ignore[no-untyped-def]
        qkvz, conv_weight, segment_ids = ctx.saved_tensors
        heads = ctx.heads
        time, tokens = segment_ids.shape[1], segment_ids.numel()
        d_qkvz = _projection_around(d_gate, qkvz)
        rows, constants = _cut(heads, conv_weight, BACKWARD_NUMBERS, BACKWARD_WARPS)
        programs = triton.cdiv(tokens, rows * STEPS)
        trains = ctx.needs_input_grad[1]
        parts = qkvz.new_empty(programs, *conv_weight.shape, dtype=torch.float32) if trains else None
        if tokens:
            _prepare_backward_kernel[(2 * heads.keys + heads.values, programs)](
                qkvz, conv_weight, segment_ids, d_query.contiguous(), d_key.contiguous(), d_value.contiguous(),
                d_qkvz, parts, tokens, time, STEPS=STEPS, **constants,
            )  # fmt: skip
        return d_qkvz, parts.sum(0).to(conv_weight.dtype) if parts is not None else None, None, None


def _cut(heads: Heads, conv_weight: Tensor, numbers: int, warps: int) -> tuple[int, dict[str, int]]:
    """Rows of a tile, and the compile-time constants of the kernels over the projection."""
    block = triton.next_power_of_2(max(heads.key_dim, heads.value_dim))
    rows = max(1, numbers // block)
    return rows, {
        "KEY_HEADS": heads.keys, "GROUP": heads.values // heads.keys, "KEY": heads.key_dim, "VALUE": heads.value_dim,
        "WIDTH": conv_weight.shape[1], "ROWS": rows, "BLOCK": block, "num_warps": warps,
    }  # fmt: skip


def _projection_around(d_gate: Tensor, qkvz: Tensor) -> Tensor:
    """The gradient of the projection with its gate columns set to `d_gate`; the other columns are uninitialised.

    If `d_gate` is the result of the backward pass of `gated_norm_fused`, its memory is reused: it has the size of the
    projection, and nothing else refers to it. Any other gradient is copied to new memory.
    """
    groups, dim = d_gate.shape[2:]
    width = qkvz.shape[-1] // groups
    grouped = (*d_gate.shape[:3], width)
    strides = torch.empty(grouped, device="meta").stride()
    owned = d_gate.untyped_storage().nbytes() == qkvz.numel() * qkvz.element_size()
    if owned and d_gate.stride() == strides and d_gate.storage_offset() == width - dim and d_gate.dtype == qkvz.dtype:
        return d_gate.as_strided(qkvz.shape, qkvz.stride(), 0)
    d_qkvz = torch.empty_like(qkvz)
    d_qkvz.view(grouped)[..., width - dim :] = d_gate
    return d_qkvz


@no_type_check
@triton.jit
def _place(slot, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr):
    """First column of a head in the projection, its first channel in the convolution, and its dimension.

    Slots number the heads of queries, then of keys, then of values.
    """
    width: tl.constexpr = 2 * KEY + 2 * GROUP * VALUE
    head = slot - 2 * KEY_HEADS
    column = (slot % KEY_HEADS) * width + tl.where(slot < KEY_HEADS, 0, KEY)
    column = tl.where(head < 0, column, (head // GROUP) * width + 2 * KEY + (head % GROUP) * VALUE)
    channel = tl.where(head < 0, slot * KEY, 2 * KEY_HEADS * KEY + head * VALUE)
    return column, channel, tl.where(head < 0, KEY, VALUE)


@no_type_check
@triton.jit
def _weights(conv_weight, channel, mask, WIDTH: tl.constexpr):
    """Convolution weights of these channels, one tuple element per tap, from the token itself backwards."""
    weights = ()
    for back in tl.static_range(WIDTH):
        one = tl.load(conv_weight + channel * WIDTH + (WIDTH - 1 - back), mask=mask, other=0.0)
        weights += (one.to(tl.float32)[None, :],)
    return weights


@no_type_check
@triton.jit
def _convolve(x, stride, segments, weights, row, inside, tokens, time, WIDTH: tl.constexpr):
    """Convolution of these rows; for every tap, the value read (or 0) and whether it is within the document.

    Args:
        x: pointers to the columns of row 0.
    """
    own = tl.load(segments + row, mask=row < tokens, other=0)
    values = ()
    reached = ()
    for back in tl.static_range(WIDTH):
        reach = (row < tokens) & (row % time >= back)
        if back > 0:
            reach = reach & (tl.load(segments + row - back, mask=reach, other=0) == own)
        at = (row - back).to(tl.int64)[:, None] * stride
        value = tl.load(x[None, :] + at, mask=reach[:, None] & inside[None, :], other=0.0).to(tl.float32)
        out = value * weights[0] if back == 0 else out + value * weights[back]
        values += (value,)
        reached += (reach[:, None],)
    return out, values, reached


@no_type_check
@triton.jit
def _prepare_kernel(
    qkvz, conv_weight, segments, query, key, value, tokens, time,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    column, channel, dim = _place(slot, KEY_HEADS, GROUP, KEY, VALUE)
    inside = at < dim
    stride: tl.constexpr = KEY_HEADS * (2 * KEY + 2 * GROUP * VALUE)
    weights = _weights(conv_weight, channel + at, inside, WIDTH)
    out, _, _ = _convolve(qkvz + column + at, stride, segments, weights, row, inside, tokens, time, WIDTH)
    out *= 1.0 / (1.0 + tl.exp(-out))
    mask = (row < tokens)[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None]
    if slot < 2 * KEY_HEADS:
        out *= tl.rsqrt(tl.sum(out * out, 1) + 1e-6)[:, None]
        place = wide * (KEY_HEADS * KEY) + (slot % KEY_HEADS) * KEY + at[None, :]
        if slot < KEY_HEADS:
            tl.store(query + place, out.to(query.dtype.element_ty), mask=mask)
        else:
            tl.store(key + place, out.to(key.dtype.element_ty), mask=mask)
    else:
        place = wide * (KEY_HEADS * GROUP * VALUE) + (slot - 2 * KEY_HEADS) * VALUE + at[None, :]
        tl.store(value + place, out.to(value.dtype.element_ty), mask=mask)


@no_type_check
@triton.jit
def _prepare_backward_kernel(
    qkvz, conv_weight, segments, d_query, d_key, d_value, d_qkvz, parts, tokens, time, STEPS: tl.constexpr,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row of the tile processes STEPS tokens, last first, preceded by the WIDTH - 1 tokens that follow them.

    `owed` carries the contributions of later tokens, so a token's gradient is complete when its step is reached.
    """
    slot, at = tl.program_id(0), tl.arange(0, BLOCK)
    start = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)) * STEPS
    column, channel, dim = _place(slot, KEY_HEADS, GROUP, KEY, VALUE)
    inside = at < dim
    stride: tl.constexpr = KEY_HEADS * (2 * KEY + 2 * GROUP * VALUE)
    weights = _weights(conv_weight, channel + at, inside, WIDTH)
    if slot < KEY_HEADS:
        given = d_query + slot * KEY
    elif slot < 2 * KEY_HEADS:
        given = d_key + (slot - KEY_HEADS) * KEY
    else:
        given = d_value + (slot - 2 * KEY_HEADS) * VALUE
    given_stride = tl.where(slot < 2 * KEY_HEADS, KEY_HEADS * KEY, KEY_HEADS * GROUP * VALUE)
    owed = (tl.zeros((ROWS, BLOCK), tl.float32),) * (WIDTH - 1)  # to the token before, the one before that, ..
    sums = (tl.zeros((ROWS, BLOCK), tl.float32),) * WIDTH
    for step in range(STEPS + WIDTH - 1):
        row = start + (STEPS + WIDTH - 2 - step)
        mask = (row < tokens)[:, None] & inside[None, :]
        wide = row.to(tl.int64)[:, None]
        out, values, reached = _convolve(
            qkvz + column + at, stride, segments, weights, row, inside, tokens, time, WIDTH
        )
        gradient = tl.load(given + wide * given_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-out))
        if slot < 2 * KEY_HEADS:
            act = out * sigmoid
            scale = tl.rsqrt(tl.sum(act * act, 1) + 1e-6)[:, None]
            gradient = scale * (gradient - act * (scale * scale * tl.sum(gradient * act, 1)[:, None]))
        gradient *= sigmoid * (1.0 + out * (1.0 - sigmoid))
        own = step >= WIDTH - 1
        d_x = gradient * weights[0]
        if WIDTH > 1:
            d_x += owed[0]
            still = ()
            for back in tl.static_range(1, WIDTH):
                debt = tl.where(reached[back], gradient * weights[back], 0.0)
                if back < WIDTH - 1:
                    debt += owed[back]
                still += (debt,)
            owed = still
        tl.store(d_qkvz + column + wide * stride + at[None, :], d_x.to(d_qkvz.dtype.element_ty), mask=mask & own)
        if parts is not None:
            more = ()
            for back in tl.static_range(WIDTH):
                more += (sums[back] + tl.where(own, gradient * values[back], 0.0),)
            sums = more
    if parts is not None:
        channels: tl.constexpr = 2 * KEY_HEADS * KEY + KEY_HEADS * GROUP * VALUE
        place = (tl.program_id(1) * channels + channel + at) * WIDTH
        for back in tl.static_range(WIDTH):
            tl.store(parts + place + (WIDTH - 1 - back), tl.sum(sums[back], 0), mask=inside)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ba, log_rate, bias, heads):  # type: ignore[no-untyped-def]
        ba = ba.contiguous()
        log_decay = ba.new_empty(*ba.shape[:2], heads.values, dtype=torch.float32)
        write = torch.empty_like(log_decay)
        tokens = ba.shape[0] * ba.shape[1]
        if tokens:
            _decay_kernel[(triton.cdiv(tokens, DECAY_ROWS),)](
                ba, log_rate, bias, log_decay, write, tokens, **_heads(heads)
            )
        ctx.save_for_backward(ba, log_rate, bias)
        ctx.heads = heads
        return log_decay, write

    @staticmethod
    def backward(ctx, d_log_decay, d_write):  # type: ignore[no-untyped-def]
        ba, log_rate, bias = ctx.saved_tensors
        tokens = ba.shape[0] * ba.shape[1]
        programs = triton.cdiv(tokens, DECAY_ROWS)
        trains = any(ctx.needs_input_grad[1:3])
        parts = ba.new_empty(programs, 2, ctx.heads.values, dtype=torch.float32) if trains else None
        d_ba = torch.empty_like(ba)
        if tokens:
            _decay_backward_kernel[(programs,)](
                ba, log_rate, bias, d_log_decay.contiguous(), d_write.contiguous(), d_ba, parts, tokens,
                **_heads(ctx.heads),
            )  # fmt: skip
        if parts is None:
            return d_ba, None, None, None
        d_log_rate, d_bias = parts.sum(0)
        return d_ba, d_log_rate.to(log_rate.dtype), d_bias.to(bias.dtype), None


def _heads(heads: Heads) -> dict[str, int]:
    return {
        "HEADS": heads.values, "GROUP": heads.values // heads.keys,
        "ROWS": DECAY_ROWS, "BLOCK": triton.next_power_of_2(heads.values), "num_warps": 4,
    }  # fmt: skip


@no_type_check
@triton.jit
def _softplus(x):
    """log(1 + exp x), accurate for small results: the factor log u / (u - 1) corrects the rounding of u = 1 + exp."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    lost = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    return tl.maximum(x, 0.0) + tl.where(rounded == 1.0, small, tl.log(rounded) * (small / lost))


@no_type_check
@triton.jit
def _decay_inputs(ba, log_rate, bias, row, head, mask, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Logits b of the write strength, a + dt_bias, exp(A_log), and the offsets of b (a is at + GROUP)."""
    place = row.to(tl.int64)[:, None] * (2 * HEADS) + ((head // GROUP) * 2 * GROUP + head % GROUP)[None, :]
    b = tl.load(ba + place, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(ba + place + GROUP, mask=mask, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(log_rate + head, mask=head < HEADS, other=0.0).to(tl.float32))
    return b, a + tl.load(bias + head, mask=head < HEADS, other=0.0).to(tl.float32)[None, :], rate[None, :], place


@no_type_check
@triton.jit
def _decay_kernel(
    ba, log_rate, bias, log_decay, write, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < tokens)[:, None] & (head < HEADS)[None, :]
    b, a, rate, _ = _decay_inputs(ba, log_rate, bias, row, head, mask, HEADS, GROUP)
    place = row.to(tl.int64)[:, None] * HEADS + head[None, :]
    tl.store(log_decay + place, -rate * _softplus(a), mask=mask)
    tl.store(write + place, tl.sigmoid(b), mask=mask)


@no_type_check
@triton.jit
def _decay_backward_kernel(
    ba, log_rate, bias, d_log_decay, d_write, d_ba, parts, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < tokens)[:, None] & (head < HEADS)[None, :]
    b, a, rate, grouped = _decay_inputs(ba, log_rate, bias, row, head, mask, HEADS, GROUP)
    place = row.to(tl.int64)[:, None] * HEADS + head[None, :]
    given = tl.load(d_log_decay + place, mask=mask, other=0.0)
    d_a = given * -rate * tl.sigmoid(a)
    sigmoid = tl.sigmoid(b)
    d_b = tl.load(d_write + place, mask=mask, other=0.0) * sigmoid * (1.0 - sigmoid)
    tl.store(d_ba + grouped, d_b.to(d_ba.dtype.element_ty), mask=mask)
    tl.store(d_ba + grouped + GROUP, d_a.to(d_ba.dtype.element_ty), mask=mask)
    if parts is not None:
        at = parts + tl.program_id(0) * (2 * HEADS) + head
        tl.store(at, tl.sum(given * -rate * _softplus(a), 0), mask=head < HEADS)
        tl.store(at + HEADS, tl.sum(d_a, 0), mask=head < HEADS)
