"""The gated delta rule: the recurrence that defines it, and the chunked form used in training.

Both isolate documents exactly: the state is zero at the start of every document.

Source: arXiv 2412.06464; `torch_recurrent_gated_delta_rule`, transformers 5.23.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def recurrent_gated_delta_rule(
    *,
    query: Float[Tensor, "batch time key_heads key"],
    key: Float[Tensor, "batch time key_heads key"],
    value: Float[Tensor, "batch time value_heads value"],
    log_decay: Float[Tensor, "batch time value_heads"],
    write: Float[Tensor, "batch time value_heads"],
    segment_ids: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch time value_heads value"]:
    """Gated delta rule, one token at a time, in float32. The definition.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(key),   S = 0 before a document

    Args:
        query: unit vectors, as is `key`; value head h uses key head h // (value_heads / key_heads).
        log_decay: log a_t, at most 0, where a_t is the decay of the state.
        write: b_t in (0, 1), the write strength.

    Returns:
        o_t in float32.
    """
    query, key = (for_every_value_head(x.float(), value) for x in (query, key))
    value, decay, write = value.float(), log_decay.float().exp(), write.float()
    continues = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=False)
    state = value.new_zeros(*query[:, 0].shape, value.shape[-1])  # (batch, heads, key, value)
    outputs = []
    for t in range(query.shape[1]):
        state = state * (decay[:, t] * continues[:, t, None])[..., None, None]
        recalled = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        correction = (value[:, t] - recalled) * write[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, dim=1) * query.shape[-1] ** -0.5


def chunked_gated_delta_rule(
    *,
    query: Float[Tensor, "batch time key_heads key"],
    key: Float[Tensor, "batch time key_heads key"],
    value: Float[Tensor, "batch time value_heads value"],
    log_decay: Float[Tensor, "batch time value_heads"],
    write: Float[Tensor, "batch time value_heads"],
    segment_ids: Int[Tensor, "batch time"],
    chunk_tokens: int = 64,
) -> Float[Tensor, "batch time value_heads value"]:
    """`recurrent_gated_delta_rule` in chunks: one triangular solve a chunk, and a loop over chunks for the state.

    Within a chunk the corrections u solve (I + L) u = b (v - a S^T k), with L_ij = b_i (k_i . k_j) a_{j+1..i} for j < i
    in the same document. Only tokens of the document that enters the chunk read the incoming state. Only the last
    document of the chunk writes the outgoing state. So every document is computed as if it were alone.

    Source: arXiv 2412.06464, section 3.3 (the WY form); the document masks are ours.
    """
    time, scale = query.shape[1], query.shape[-1] ** -0.5
    pad = -time % chunk_tokens
    query, key, value = (
        F.pad(x, (0, 0, 0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, chunk_tokens))
        for x in (
            for_every_value_head(query.float() * scale, value),
            for_every_value_head(key.float(), value),
            value.float(),
        )
    )  # (batch, heads, chunks, chunk, dim)
    log_decay, write = (
        F.pad(x.float(), (0, 0, 0, pad)).transpose(1, 2).unflatten(2, (-1, chunk_tokens)) for x in (log_decay, write)
    )  # (batch, heads, chunks, chunk)
    segment = F.pad(segment_ids, (0, pad), value=-2).unflatten(1, (-1, chunk_tokens)).unsqueeze(1)
    last = segment[..., -1:]  # the document at the end of each chunk
    entering = F.pad(last[:, :, :-1], (0, 0, 1, 0), value=-3)  # the last one of the chunk before

    reaches = (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()  # (batch, 1, chunks, chunk, chunk)
    # Sum of log decays over the token's own document within the chunk, up to and including the token. Differences of a
    # cumulative sum over the chunk would have rounding errors that depend on other documents.
    total = (reaches.to(log_decay.dtype) @ log_decay.unsqueeze(-1)).squeeze(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~reaches, -torch.inf).exp()
    since_start = total.exp() * (segment == entering)
    until_end = (total[..., -1:] - total).masked_fill(segment != last, -torch.inf).exp()
    survives = (total[..., -1].exp() * (last == entering)[..., 0])[..., None, None]

    system = (key * write.unsqueeze(-1)) @ key.transpose(-1, -2) * between
    right = torch.cat((value * write.unsqueeze(-1), key * (write * since_start).unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, recall = solved.split([value.shape[-1], key.shape[-1]], dim=-1)

    within = query @ key.transpose(-1, -2) * between
    reads = query * since_start.unsqueeze(-1)
    leaves = (key * until_end.unsqueeze(-1)).transpose(-1, -2)
    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    outputs = []
    chunks = (x.unbind(2) for x in (written, recall, reads, within, leaves, survives))
    for w, r, q, scores, k, share in zip(*chunks, strict=True):  # an index's gradient has the size of all chunks
        correction = w - r @ state
        outputs.append(q @ state + scores @ correction)
        state = state * share + k @ correction
    return torch.cat(outputs, dim=2)[:, :, :time].transpose(1, 2)


def for_every_value_head(
    x: Float[Tensor, "batch time key_heads key"], value: Float[Tensor, "batch time value_heads value"]
) -> Float[Tensor, "batch time value_heads key"]:
    """Queries or keys, each key head repeated for the value heads that share it."""
    return x.repeat_interleave(value.shape[2] // x.shape[2], dim=2)
