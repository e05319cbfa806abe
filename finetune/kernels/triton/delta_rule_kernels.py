"""Triton kernels of the chunked gated delta rule; `delta_rule.py` launches them and describes the tensors.

Documents are isolated by masks within a chunk, that is by multiplication with an exact zero. Log decays are sums over
tokens of one document, never differences of sums across a document boundary.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _decays(log_decay, segments, batch, chunk, head, time, HEADS: tl.constexpr, C: tl.constexpr):
    """Mask (same document, not later) and decays of a chunk: between tokens, from its start, and to its end."""
    at = tl.arange(0, C)
    start = batch.to(tl.int64) * time + chunk * C
    live = at < time - chunk * C
    segment = tl.load(segments + start + at, mask=live, other=-2)
    last = tl.load(segments + start + C - 1, mask=chunk * C + C <= time, other=-2)  # last document of the chunk
    entering = tl.load(segments + start - 1, mask=chunk > 0, other=-3)  # none enters the first chunk
    log = tl.load(log_decay + (start + at) * HEADS + head, mask=live, other=0.0)
    reaches = (segment[:, None] == segment[None, :]) & (at[:, None] >= at[None, :])
    total = tl.sum(tl.where(reaches, log[None, :], 0.0), 1)
    whole = tl.sum(tl.where(at == C - 1, total, 0.0), 0)
    between = tl.exp(tl.where(reaches, total[:, None] - total[None, :], float("-inf")))
    from_start = tl.where(segment == entering, tl.exp(total), 0.0)
    to_end = tl.exp(tl.where(segment == last, whole - total, float("-inf")))
    return reaches, between, from_start, to_end


@triton.jit
@no_type_check
def chunk_kernel(
    query, key, log_decay, write, segments, inverse, within, enters, leaves, time, q_stride, k_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, column = tl.arange(0, C), tl.arange(0, K)
    start = batch.to(tl.int64) * time + chunk * C
    live = at < time - chunk * C
    _, between, from_start, to_end = _decays(log_decay, segments, batch, chunk, head, time, HEADS, C)
    b = tl.load(write + (start + at) * HEADS + head, mask=live, other=0.0)
    here = (batch.to(tl.int64) * HEADS + head) * tl.num_programs(1) + chunk
    tl.store(enters + here * C + at, from_start)
    tl.store(leaves + here * C + at, to_end * b)

    side = (head // GROUP) * K + column[None, :]
    k = tl.load(key + start * k_stride + (at * k_stride)[:, None] + side, mask=live[:, None], other=0.0)
    q = tl.load(query + start * q_stride + (at * q_stride)[:, None] + side, mask=live[:, None], other=0.0)
    decay = between * b[None, :]
    square = at[:, None] * C + at[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale * decay
    tl.store(within + here * C * C + square, scores.to(within.dtype.element_ty))
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay
    inverted = _invert(tl.where(at[:, None] > at[None, :], system, 0.0), C, INVERSE_PRECISION)
    inverted = tl.where(at[:, None] > at[None, :], inverted, 0.0)
    tl.store(inverse + here * C * C + square, inverted.to(inverse.dtype.element_ty))


@triton.jit
@no_type_check
def _invert(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular matrix, by diagonal blocks of size 2, 4, .. C.

    Let A be the inverse of the block diagonal, and F the entries below it in the blocks of twice the size. Then
    (A^-1 + F)^-1 = A - A F A, since F A F = 0. As stable as substitution, unlike a product of powers.
    """
    at = tl.arange(0, C)
    inverted = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    inverted -= tl.where(at[:, None] // 2 == at[None, :] // 2, system, 0.0)
    for level in tl.static_range(1, 10):
        if 2 << level <= C:
            row, column = at[:, None] >> level, at[None, :] >> level
            between = tl.where((row == column + 1) & (column % 2 == 0), system, 0.0)
            half = tl.dot(between, inverted, input_precision=PRECISION)
            inverted -= tl.dot(inverted, half, input_precision=PRECISION)
    return inverted


@triton.jit
@no_type_check
def scan_kernel(
    query, key, value, inverse, within, enters, leaves, out, deltas, states, time, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scan over BV value columns of one head: store `out`, or without it `deltas` and the incoming `states`."""
    head, batch = tl.program_id(1), tl.program_id(2)
    at, column, along = tl.arange(0, C), tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, K)
    dtype: tl.constexpr = value.dtype.element_ty
    chunks = tl.cdiv(time, C)
    square = at[:, None] * C + at[None, :]
    state = tl.zeros((K, BV), tl.float32)
    for chunk in range(chunks):
        start = batch.to(tl.int64) * time + chunk * C
        here = (batch.to(tl.int64) * HEADS + head) * chunks + chunk
        live = (at < time - chunk * C)[:, None]
        side = (head // GROUP) * K + along[None, :]
        k = tl.load(key + start * k_stride + (at * k_stride)[:, None] + side, mask=live, other=0.0)
        v = tl.load(
            value + start * v_stride + (at * v_stride)[:, None] + head * V + column[None, :], mask=live, other=0.0
        )
        solve = tl.load(inverse + here * C * C + square)
        from_start, to_end = tl.load(enters + here * C + at), tl.load(leaves + here * C + at)
        stays = tl.load(enters + here * C + C - 1)

        narrow = state.to(dtype)
        rest = v.to(tl.float32) - from_start[:, None] * tl.dot(k, narrow, input_precision=PRECISION)
        delta = tl.dot(solve, rest.to(dtype), rest, input_precision=PRECISION)
        if out is not None:
            q = tl.load(query + start * q_stride + (at * q_stride)[:, None] + side, mask=live, other=0.0)
            scores = tl.load(within + here * C * C + square)
            o = tl.dot(q, narrow, input_precision=PRECISION) * (from_start * scale)[:, None]
            o = tl.dot(scores, delta.to(dtype), o, input_precision=PRECISION)
            place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
            tl.store(out + place, o.to(dtype), mask=live)
        else:
            place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
            tl.store(deltas + place, delta.to(dtype), mask=live)
            tl.store(states + here * K * V + along[:, None] * V + column[None, :], narrow)
        written = (delta * to_end[:, None]).to(dtype)
        state = tl.dot(tl.trans(k), written, state * stays, input_precision=PRECISION)


@triton.jit
@no_type_check
def reverse_kernel(
    query, key, gradient, inverse, within, enters, leaves, d_states, d_value, time, q_stride, k_stride, g_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reverse scan over BV columns of a head: gradients of the values and of the state after each chunk."""
    head, batch = tl.program_id(1), tl.program_id(2)
    at, column, along = tl.arange(0, C), tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, K)
    dtype: tl.constexpr = d_value.dtype.element_ty
    chunks = tl.cdiv(time, C)
    square = at[:, None] * C + at[None, :]
    d_state = tl.zeros((K, BV), tl.float32)
    for turn in range(chunks):
        chunk = chunks - 1 - turn
        start = batch.to(tl.int64) * time + chunk * C
        here = (batch.to(tl.int64) * HEADS + head) * chunks + chunk
        live = (at < time - chunk * C)[:, None]
        side = (head // GROUP) * K + along[None, :]
        k = tl.load(key + start * k_stride + (at * k_stride)[:, None] + side, mask=live, other=0.0)
        q = tl.load(query + start * q_stride + (at * q_stride)[:, None] + side, mask=live, other=0.0)
        place = start * g_stride + (at * g_stride)[:, None] + head * V + column[None, :]
        given = tl.load(gradient + place, mask=live, other=0.0)
        solve, scores = tl.load(inverse + here * C * C + square), tl.load(within + here * C * C + square)
        from_start, to_end = tl.load(enters + here * C + at), tl.load(leaves + here * C + at)
        stays = tl.load(enters + here * C + C - 1)

        narrow = d_state.to(dtype)
        tl.store(d_states + here * K * V + along[:, None] * V + column[None, :], narrow)
        d_delta = to_end[:, None] * tl.dot(k, narrow, input_precision=PRECISION)
        d_delta = tl.dot(tl.trans(scores), given, d_delta, input_precision=PRECISION)
        d_v = tl.dot(tl.trans(solve), d_delta.to(dtype), d_delta, input_precision=PRECISION)
        place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
        tl.store(d_value + place, d_v.to(dtype), mask=live)
        reads = (given.to(tl.float32) * (from_start * scale)[:, None]).to(dtype)
        recalls = (d_v * -from_start[:, None]).to(dtype)
        d_state = tl.dot(tl.trans(q), reads, d_state * stays, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(k), recalls, d_state, input_precision=PRECISION)


@triton.jit
@no_type_check
def gradient_kernel(
    query, key, gradient, deltas, d_value, states, d_states, log_decay, write, segments,
    d_query, d_key, d_log_decay, d_write, time, q_stride, k_stride, g_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys, decays and writes of one chunk and value head.

    Three parts, computed one after the other because their accumulators together exceed the registers: through pairs of
    tokens, through the state before the chunk, through the state after it.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, column = tl.arange(0, C), tl.arange(0, K)
    dtype: tl.constexpr = d_query.dtype.element_ty
    start = batch.to(tl.int64) * time + chunk * C
    here = (batch.to(tl.int64) * HEADS + head) * tl.num_programs(1) + chunk
    live = at < time - chunk * C
    side = (head // GROUP) * K + column[None, :]
    k = tl.load(key + start * k_stride + (at * k_stride)[:, None] + side, mask=live[:, None], other=0.0)
    q = tl.load(query + start * q_stride + (at * q_stride)[:, None] + side, mask=live[:, None], other=0.0)
    scores, system, d_b, d_total = _from_pairs(
        q, k, gradient, deltas, d_value, log_decay, write, segments, batch, chunk, head, time, start, live,
        g_stride, scale, HEADS, V, BV, C, PRECISION,
    )  # fmt: skip
    b = tl.load(write + (start + at) * HEADS + head, mask=live, other=0.0)
    reaches, _, from_start, to_end = _decays(log_decay, segments, batch, chunk, head, time, HEADS, C)
    place = (start * HEADS + head) * K + (at * HEADS * K)[:, None] + column[None, :]

    d_q, d_k = _from_state_before(
        gradient, d_value, states, from_start, start, live, here, head, g_stride, scale, HEADS, K, V, BV, C, PRECISION
    )
    d_total += tl.sum(q.to(tl.float32) * d_q + k.to(tl.float32) * d_k, 1)
    d_q = tl.dot((scores.to(tl.float32) * b[None, :]).to(dtype), k, d_q, input_precision=PRECISION)
    tl.store(d_query + place, d_q.to(dtype), mask=live[:, None])
    d_k = tl.dot((system.to(tl.float32) * b[None, :]).to(dtype), k, d_k, input_precision=PRECISION)

    d_written, stayed = _from_state_after(
        deltas, states, d_states, to_end, start, live, here, head, HEADS, K, V, BV, C, PRECISION
    )
    left = tl.sum(k.to(tl.float32) * d_written, 1)
    d_written = tl.dot(tl.trans(scores), q, d_written, input_precision=PRECISION)
    d_written = tl.dot(tl.trans(system), k, d_written, input_precision=PRECISION)
    tl.store(d_key + place, (d_k + b[:, None] * d_written).to(dtype), mask=live[:, None])

    d_b += left
    d_total -= b * d_b
    of_last = tl.sum(b * left, 0) + stayed * tl.sum(tl.where(at == C - 1, from_start, 0.0), 0)
    d_total += tl.where(at == C - 1, of_last, 0.0)
    d_log = tl.sum(tl.where(reaches, d_total[:, None], 0.0), 0)
    tl.store(d_log_decay + (start + at) * HEADS + head, d_log, mask=live)
    tl.store(d_write + (start + at) * HEADS + head, d_b, mask=live)


@triton.jit
@no_type_check
def _from_pairs(
    q, k, gradient, deltas, d_value, log_decay, write, segments, batch, chunk, head, time, start, live, g_stride, scale,
    HEADS: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q_i . k_j and k_i . k_j, without the factor b_j; and their part of those of b and the decays."""
    at = tl.arange(0, C)
    d_scores, d_system = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, V, BV):
        column = first + tl.arange(0, BV)
        place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
        delta = tl.load(deltas + place, mask=live[:, None], other=0.0)
        d_v = tl.load(d_value + place, mask=live[:, None], other=0.0)
        place = start * g_stride + (at * g_stride)[:, None] + head * V + column[None, :]
        given = tl.load(gradient + place, mask=live[:, None], other=0.0)
        d_scores = tl.dot(given, tl.trans(delta), d_scores, input_precision=PRECISION)
        d_system = tl.dot(d_v, tl.trans(delta), d_system, input_precision=PRECISION)
    _, between, _, _ = _decays(log_decay, segments, batch, chunk, head, time, HEADS, C)
    d_scores *= between * scale
    d_system = tl.where(at[:, None] > at[None, :], -d_system * between, 0.0)
    # Gradient of b_j for every pair; times b_j, it is the gradient of the pair's log decay.
    pairs = d_scores * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    pairs += d_system * tl.dot(k, tl.trans(k), input_precision=PRECISION)
    b = tl.load(write + (start + at) * HEADS + head, mask=live, other=0.0)
    return d_scores.to(q.dtype), d_system.to(q.dtype), tl.sum(pairs, 0), tl.sum(pairs * b[None, :], 1)


@triton.jit
@no_type_check
def _from_state_before(
    gradient, d_value, states, from_start, start, live, here, head, g_stride, scale,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k through the state before the chunk."""
    at, along = tl.arange(0, C), tl.arange(0, K)
    d_q, d_k = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    for first in range(0, V, BV):
        column = first + tl.arange(0, BV)
        place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
        d_v = tl.load(d_value + place, mask=live[:, None], other=0.0)
        place = start * g_stride + (at * g_stride)[:, None] + head * V + column[None, :]
        given = tl.load(gradient + place, mask=live[:, None], other=0.0)
        state = tl.load(states + here * K * V + along[:, None] * V + column[None, :])
        reads = (given.to(tl.float32) * (from_start * scale)[:, None]).to(state.dtype)
        recalls = (d_v.to(tl.float32) * -from_start[:, None]).to(state.dtype)
        d_q = tl.dot(reads, tl.trans(state), d_q, input_precision=PRECISION)
        d_k = tl.dot(recalls, tl.trans(state), d_k, input_precision=PRECISION)
    return d_q, d_k


@triton.jit
@no_type_check
def _from_state_after(
    deltas, states, d_states, to_end, start, live, here, head,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of b k through the state after the chunk, and of the decay of the state itself."""
    at, along = tl.arange(0, C), tl.arange(0, K)
    d_written = tl.zeros((C, K), tl.float32)
    stayed = 0.0
    for first in range(0, V, BV):
        column = first + tl.arange(0, BV)
        place = (start * HEADS + head) * V + (at * HEADS * V)[:, None] + column[None, :]
        delta = tl.load(deltas + place, mask=live[:, None], other=0.0)
        inside = here * K * V + along[:, None] * V + column[None, :]
        d_state = tl.load(d_states + inside)
        written = (delta.to(tl.float32) * to_end[:, None]).to(d_state.dtype)
        d_written = tl.dot(written, tl.trans(d_state), d_written, input_precision=PRECISION)
        stayed += tl.sum(tl.load(states + inside).to(tl.float32) * d_state.to(tl.float32))
    return d_written, stayed
