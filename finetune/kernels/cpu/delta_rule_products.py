"""The chunked gated delta rule as batched matrix products with a hand-written backward pass; for a CPU.

Plain torch. Definition: `recurrent_gated_delta_rule` in `model/delta_rule.py`. The chunks and masks are those of
`chunked_gated_delta_rule` there. For keys k, scaled queries q, values v, writes b and decays M_ij = a_{j+1..i}, with
R_ij = M_ij (k_i . k_j) b_j below the diagonal, s the decay of the incoming state up to a token, and e the decay from a
token to the end of the chunk:

    (I + R) r = v - s (k S),   out = s (q S) + (M q k^T) (b r),   S' = survives S + k^T (e b r)

The columns of the system are scaled by b, so r is the correction before the write strength, and no gradient divides by
b. The gradients of the decays need no further matrix product, because out and r are linear in the decayed terms:

    d total_i = out_i . d out_i + (r_i - v_i) . d v_i - b_i d b_i,   plus S' . d S' for the last token of a chunk

The results of a sequence do not depend on the rest of the batch. Documents are isolated bit for bit.

Source: arXiv 2412.06464, section 3.3; the scaling and the gradients are ours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

DIRECT = 16  # rows of the triangular blocks that are inverted by substitution


class Decays(NamedTuple):
    """Decay factors by chunk; `heads` are the value heads of all sequences."""

    between: Float[Tensor, "chunks heads chunk chunk"]  # from a token (column) to itself or a later one (row); else 0
    since_start: Float[Tensor, "chunks heads chunk 1"]  # of the incoming state up to a token; 0 in other documents
    until_end: Float[Tensor, "chunks heads chunk 1"]  # from a token to the outgoing state; 0 in other documents
    survives: Float[Tensor, "chunks heads 1 1"]  # from the incoming to the outgoing state
    reaches: Bool[Tensor, "chunks batch chunk chunk"]  # same document, and column not after row


def gated_delta_rule_by_products(
    *,
    query: Float[Tensor, "batch time key_heads key"],
    key: Float[Tensor, "batch time key_heads key"],
    value: Float[Tensor, "batch time value_heads value"],
    log_decay: Float[Tensor, "batch time value_heads"],
    write: Float[Tensor, "batch time value_heads"],
    segment_ids: Int[Tensor, "batch time"],
    chunk_tokens: int = 64,
) -> Float[Tensor, "batch time value_heads value"]:
    """Equivalent of `chunked_gated_delta_rule`, in float32.

    Args:
        chunk_tokens: a power of two.
    """
    assert chunk_tokens & (chunk_tokens - 1) == 0, "triangular systems are inverted by halves"
    wide = (x.float() for x in (query, key, value, log_decay, write))
    return _Rule.apply(*wide, segment_ids, chunk_tokens)


class _Rule(torch.autograd.Function):
    """Forward and backward on tensors of shape (chunks, sequences x heads, tokens, dim), as batched products."""

    @staticmethod
    def forward(ctx, query, key, value, log_decay, write, segment_ids, chunk_tokens):  # type: ignore[no-untyped-def]
        batch, time, _, dim = query.shape
        query, key, value, write = (_cut(x, chunk_tokens) for x in (query * dim**-0.5, key, value, write))
        write = write.unsqueeze(-1)
        decays = _decays(_cut(log_decay, chunk_tokens), segment_ids, chunk_tokens)
        between = decays.between.unflatten(1, (key.shape[1], -1))  # by key head, then its value heads
        alike = (key @ key.mT).tril_(-1)
        scores = query @ key.mT
        system = (alike.unsqueeze(2) * between).mul_(write.unflatten(1, (key.shape[1], -1)).mT)
        inverse = _inverse(system.flatten(0, 2)).view_as(decays.between)

        state, correction = _states(_shared(key, value), value, write, inverse, decays)
        out = (_shared(query, value) @ state[:-1]).mul_(decays.since_start).flatten(0, 1)
        within = (scores.unsqueeze(2) * between).flatten(0, 2)
        out.baddbmm_(within, (correction * write).flatten(0, 1))
        out = _join(out.view_as(value), batch, time).contiguous()
        ctx.save_for_backward(query, key, value, write, alike, scores, inverse, state, correction, out, *decays)
        return out

    @staticmethod
    def backward(ctx, given):  # type: ignore[no-untyped-def]
        query, key, value, write, alike, scores, inverse, state, correction, out, *rest = ctx.saved_tensors
        decays = Decays(*rest)
        (batch, time), chunk_tokens = given.shape[:2], key.shape[2]
        between = decays.between.unflatten(1, (key.shape[1], -1))
        towards_out = (given * out).sum(-1)
        given = _cut(given, chunk_tokens)
        read = given * decays.since_start

        d_written = (scores.unsqueeze(2) * between).flatten(1, 2).mT @ given
        d_state = _shared(query, value).mT @ read
        d_state, d_value = _states_backward(_shared(key, value), d_state, d_written, write, inverse, decays)

        d_scores = (given @ (correction * write).mT).view_as(between).mul_(between)
        d_system = (d_value @ correction.mT).view_as(between).mul_(between)  # negated; subtracted below
        d_write = (correction * d_written).sum(-1) - (d_system * alike.unsqueeze(2)).sum(-2).flatten(1, 2)
        d_scores = d_scores.sum(2)
        d_alike = d_system.mul_(write.unflatten(1, (key.shape[1], -1)).mT).sum(2).tril_(-1)
        before, after = state[:-1].mT, d_state[1:].mT
        d_query = _added(read @ before, key).add_(d_scores @ key).mul_(key.shape[-1] ** -0.5)
        d_key = (correction * (write * decays.until_end)) @ after - (d_value * decays.since_start) @ before
        d_key = _added(d_key, key).add_(d_scores.mT @ query).sub_((d_alike + d_alike.mT) @ key)

        d_total = ((correction - value) * d_value).sum(-1) - write.squeeze(-1) * d_write
        d_total += _cut(towards_out, chunk_tokens)
        d_total[..., -1] += (state[1:] * d_state[1:]).sum((2, 3))
        d_decay = (d_total.unflatten(1, (batch, -1)) @ decays.reaches.float()).flatten(1, 2)
        gradients = (_join(x, batch, time) for x in (d_query, d_key, d_value, d_decay, d_write))
        return *gradients, None, None


def _states(
    key: Float[Tensor, "chunks heads chunk key"],
    value: Float[Tensor, "chunks heads chunk value"],
    write: Float[Tensor, "chunks heads chunk 1"],
    inverse: Float[Tensor, "chunks heads chunk chunk"],
    decays: Decays,
) -> tuple[Float[Tensor, "chunks_1 heads key value"], Float[Tensor, "chunks heads chunk value"]]:
    """The states before each chunk and after the last one, and r of the module's first equation."""
    chunks, heads, _, dim = key.shape
    state = key.new_zeros(chunks + 1, heads, dim, value.shape[-1])
    correction, buffer = torch.empty_like(value), value.new_empty(value.shape[1:])
    kept = write * decays.until_end
    for n in range(chunks):
        torch.bmm(key[n], state[n], out=buffer)
        torch.addcmul(value[n], decays.since_start[n], buffer, value=-1, out=buffer)
        torch.bmm(inverse[n], buffer, out=correction[n])
        torch.mul(correction[n], kept[n], out=buffer)
        torch.mul(state[n], decays.survives[n], out=state[n + 1])
        state[n + 1].baddbmm_(key[n].mT, buffer)
    return state, correction


def _states_backward(
    key: Float[Tensor, "chunks heads chunk key"],
    d_read: Float[Tensor, "chunks heads key value"],
    d_written: Float[Tensor, "chunks heads chunk value"],
    write: Float[Tensor, "chunks heads chunk 1"],
    inverse: Float[Tensor, "chunks heads chunk chunk"],
    decays: Decays,
) -> tuple[Float[Tensor, "chunks_1 heads key value"], Float[Tensor, "chunks heads chunk value"]]:
    """Gradients of the states and of the values, from the last chunk to the first.

    Args:
        d_read: gradients of the state before each chunk through the outputs of that chunk.
        d_written: gradients of b r through the chunk's own outputs; those through later chunks are added in place.
    """
    chunks, heads, dim, _ = d_read.shape
    d_state = d_read.new_zeros(chunks + 1, heads, dim, d_read.shape[-1])
    d_value, buffer = torch.empty_like(d_written), d_written.new_empty(d_written.shape[1:])
    for n in reversed(range(chunks)):
        torch.bmm(key[n], d_state[n + 1], out=buffer)
        d_written[n].addcmul_(buffer, decays.until_end[n])
        torch.mul(d_written[n], write[n], out=buffer)
        torch.bmm(inverse[n].mT, buffer, out=d_value[n])
        torch.mul(d_value[n], decays.since_start[n], out=buffer)
        torch.addcmul(d_read[n], d_state[n + 1], decays.survives[n], out=d_state[n])
        d_state[n].baddbmm_(key[n].mT, buffer, alpha=-1)
    return d_state, d_value


def _decays(
    log_decay: Float[Tensor, "chunks heads chunk"], segment_ids: Int[Tensor, "batch time"], chunk_tokens: int
) -> Decays:
    """Decay factors, from sums of log decays within each token's document; see `chunked_gated_delta_rule`."""
    pad = -segment_ids.shape[1] % chunk_tokens
    segment = _cut(F.pad(segment_ids, (0, pad), value=-2).unsqueeze(-1), chunk_tokens)  # (chunks, batch, chunk)
    last = segment[..., -1:]  # the document at the end of each chunk
    entering = F.pad(last[:-1], (0, 0, 0, 0, 1, 0), value=-3)  # the last one of the chunk before
    reaches = (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()
    by_sequence = log_decay.unflatten(1, (segment.shape[1], -1))
    total = by_sequence @ reaches.float().mT  # (chunks, batch, heads of a sequence, chunk)
    apart = torch.zeros(reaches.shape).masked_fill_(~reaches, -torch.inf).unsqueeze(2)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(apart).exp_()
    since_start = total.exp() * (segment == entering).unsqueeze(2)
    until_end = (total[..., -1:] - total).masked_fill((segment != last).unsqueeze(2), -torch.inf).exp()
    survives = total[..., -1:].exp() * (last == entering).unsqueeze(2)
    return Decays(
        between.flatten(1, 2),
        since_start.flatten(1, 2).unsqueeze(-1),
        until_end.flatten(1, 2).unsqueeze(-1),
        survives.flatten(1, 2).unsqueeze(-1),
        reaches,
    )


def _inverse(lower: Float[Tensor, "systems rows rows"]) -> Float[Tensor, "systems rows rows"]:
    """(I + lower)^-1 of strictly lower triangles: small blocks by substitution, then pairs of blocks by the formula.

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
    """
    rows = lower.shape[-1]
    size = min(DIRECT, rows)
    blocks = _diagonal_blocks(lower, size)
    inverse = torch.linalg.solve_triangular(blocks, torch.eye(size).expand_as(blocks), upper=False, unitriangular=True)
    while size < rows:
        first, last = inverse.unflatten(0, (-1, 2)).unbind(1)
        corner = last @ _diagonal_blocks(lower, 2 * size)[:, size:, :size] @ first
        size *= 2
        inverse = lower.new_zeros(len(first), size, size)
        inverse[:, : size // 2, : size // 2] = first
        inverse[:, size // 2 :, : size // 2] = corner.neg_()
        inverse[:, size // 2 :, size // 2 :] = last
    return inverse


def _diagonal_blocks(x: Float[Tensor, "systems rows rows"], size: int) -> Float[Tensor, "blocks size size"]:
    """The diagonal blocks of every matrix, matrix by matrix."""
    blocks = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def _cut(x: Shaped[Tensor, "batch time heads *dim"], size: int) -> Shaped[Tensor, "chunks heads_of_all size *dim"]:
    """Split time into chunks for all heads of all sequences; the last chunk is padded with zeros."""
    pad = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) if pad else x
    return x.unflatten(1, (x.shape[1] // size, size)).movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()


def _join(
    x: Shaped[Tensor, "chunks heads_of_all size *dim"], batch: int, time: int
) -> Shaped[Tensor, "batch time heads *dim"]:
    """The inverse of `_cut`."""
    return x.unflatten(1, (batch, -1)).movedim(0, 2).movedim(1, 3).flatten(1, 2)[:, :time]


def _shared(by_key: Float[Tensor, "chunks key_heads chunk key"], by_value: Tensor) -> Tensor:
    """Keys or queries, repeated for every value head."""
    group = by_value.shape[1] // by_key.shape[1]
    return by_key if group == 1 else by_key.repeat_interleave(group, dim=1)


def _added(
    by_value: Float[Tensor, "chunks heads chunk key"], key: Tensor
) -> Float[Tensor, "chunks key_heads chunk key"]:
    """Sum over the value heads of each key head: the gradient of `_shared`."""
    return by_value.unflatten(1, (key.shape[1], -1)).sum(2)
