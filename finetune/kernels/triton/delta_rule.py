"""Chunked gated delta rule, forward and backward; Triton.

Forward: one kernel for the state-independent part of every chunk (the inverse of its triangular system, the scores of
its queries), parallel over chunks; then a scan over the chunks of a head, with the state in registers.
Backward: the scan again, for the states; a reverse scan for their gradients; and one kernel for the other gradients,
parallel over chunks and value heads. Value heads that share a key head are summed afterwards. No atomics: results are
bitwise reproducible.

Saved for the backward pass besides the inputs: two chunk x chunk matrices for every chunk and value head, and two
float32 numbers for every token and value head. With 32 value heads and bfloat16 that is 8.4 KB a token.

Definition: `finetune.model.delta_rule`. The kernels: `delta_rule_kernels.py`.
"""

from typing import NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from finetune.kernels.triton.delta_rule_kernels import chunk_kernel, gradient_kernel, reverse_kernel, scan_kernel

CHUNK = 64  # tokens
HEAD_DIMS = (16, 32, 64, 128)


class Sizes(NamedTuple):
    """Launch parameters: value columns of one program (or of one iteration), warps, pipeline stages."""

    columns: int
    warps: int
    stages: int


def gated_delta_rule(
    *,
    query: Float[Tensor, "batch time key_heads key"],
    key: Float[Tensor, "batch time key_heads key"],
    value: Float[Tensor, "batch time value_heads value"],
    log_decay: Float[Tensor, "batch time value_heads"],
    write: Float[Tensor, "batch time value_heads"],
    segment_ids: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch time value_heads value"]:
    """Equivalent of `finetune.model.delta_rule.chunked_gated_delta_rule`, in the dtype of query, key and value.

    Matrix products have operands of that dtype (float32 by three TF32 products); states and decays are float32.

    Raises:
        ValueError: unsupported head dims or dtypes.
    """
    for name, x in (("key", key), ("value", value)):
        if x.shape[-1] not in HEAD_DIMS:
            raise ValueError(f"delta rule kernel: the {name} head dim is {x.shape[-1]}; it must be one of {HEAD_DIMS}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"delta rule kernel: query, key and value must have one dtype, not {query.dtype}, {key.dtype} and"
            f" {value.dtype}"
        )
    return _GatedDeltaRule.apply(query, key, value, log_decay.float(), write.float(), segment_ids)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_decay, write, segment_ids):  # type: ignore[no-untyped-def]
        query, key, value = (_token_rows(x) for x in (query, key, value))
        log_decay, write, segment_ids = (x.contiguous() for x in (log_decay, write, segment_ids))
        chunks = _chunks(query, key, log_decay, write, segment_ids)
        out = value.new_empty(value.shape)
        _scan(query, key, value, chunks, out, None, None)
        ctx.save_for_backward(query, key, value, log_decay, write, segment_ids, *chunks)
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        query, key, value, log_decay, write, segment_ids, *saved = ctx.saved_tensors
        chunks, gradient = _Chunks(*saved), _token_rows(gradient)
        states = value.new_empty(*chunks.inverse.shape[:3], key.shape[-1], value.shape[-1])
        deltas, d_value, d_states = (x.new_empty(x.shape) for x in (value, value, states))
        _scan(query, key, value, chunks, None, deltas, states)
        _reverse(query, key, gradient, chunks, d_states, d_value)
        by_head = (*value.shape[:3], key.shape[-1])
        d_query, d_key = query.new_empty(by_head), key.new_empty(by_head)
        d_log_decay, d_write = torch.empty_like(log_decay), torch.empty_like(write)
        batch, time, heads = log_decay.shape
        if time:
            sizes = _gradient_sizes(value)
            gradient_kernel[(heads, triton.cdiv(time, CHUNK), batch)](
                query, key, gradient, deltas, d_value, states, d_states, log_decay, write, segment_ids,
                d_query, d_key, d_log_decay, d_write, time, query.stride(1), key.stride(1), gradient.stride(1),
                key.shape[-1] ** -0.5, HEADS=heads, GROUP=heads // key.shape[2], K=key.shape[-1], V=value.shape[-1],
                BV=sizes.columns, C=CHUNK, PRECISION=_precision(value), num_warps=sizes.warps, num_stages=sizes.stages,
            )  # fmt: skip
        d_query, d_key = (x.unflatten(2, (key.shape[2], -1)).sum(3) for x in (d_query, d_key))
        return d_query, d_key, d_value, d_log_decay, d_write, None


class _Chunks(NamedTuple):
    """The state-independent part of every chunk.

    With D_ij the decay from token j to token i of one document and b the write strengths:

    - `inverse` is (I + L)^-1 - I, where L_ij = (k_i . k_j) D_ij b_j for j < i. The corrections before b, `deltas`, are
      (I + inverse) (value - recall).
    - `within` is q_i . k_j D_ij b_j / sqrt(key) for j <= i.
    - `enters` is the decay from the start of the chunk to the token, zero for documents that start in the chunk. Its
      last element is the decay of the state over the chunk.
    - `leaves` is b times the decay from the token to the end of the chunk, zero for documents that end in it.
    """

    inverse: Float[Tensor, "batch heads chunks chunk chunk"]
    within: Float[Tensor, "batch heads chunks chunk chunk"]
    enters: Float[Tensor, "batch heads padded_time"]
    leaves: Float[Tensor, "batch heads padded_time"]


def _chunks(query: Tensor, key: Tensor, log_decay: Tensor, write: Tensor, segment_ids: Tensor) -> _Chunks:
    batch, time, heads = log_decay.shape
    count = triton.cdiv(time, CHUNK)
    matrices = query.new_empty(2, batch, heads, count, CHUNK, CHUNK)
    vectors = log_decay.new_empty(2, batch, heads, count * CHUNK)
    chunks = _Chunks(*matrices, *vectors)
    if time:
        chunk_kernel[(heads, count, batch)](
            query, key, log_decay, write, segment_ids, *chunks, time, query.stride(1), key.stride(1),
            key.shape[-1] ** -0.5, HEADS=heads, GROUP=heads // key.shape[2], K=key.shape[-1], C=CHUNK,
            PRECISION=_precision(query), INVERSE_PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return chunks


def _scan(
    query: Tensor, key: Tensor, value: Tensor, chunks: _Chunks, out: Tensor | None, deltas: Tensor | None,
    states: Tensor | None,
) -> None:  # fmt: skip
    """Scan over chunks: write the outputs; or, for the backward pass, corrections and the state before each chunk."""
    batch, time, heads, columns = value.shape
    if not time:
        return
    sizes = _walk_sizes(value)
    scan_kernel[(columns // sizes.columns, heads, batch)](
        query, key, value, *chunks, out, deltas, states, time, query.stride(1), key.stride(1), value.stride(1),
        key.shape[-1] ** -0.5, HEADS=heads, GROUP=heads // key.shape[2], K=key.shape[-1], V=columns,
        BV=sizes.columns, C=CHUNK, PRECISION=_precision(value), num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


def _reverse(query: Tensor, key: Tensor, gradient: Tensor, chunks: _Chunks, d_states: Tensor, d_value: Tensor) -> None:
    """Reverse scan over chunks: write the gradients of the values and of the state after each chunk."""
    batch, time, heads, columns = gradient.shape
    if not time:
        return
    sizes = _walk_sizes(gradient, backwards=True)
    reverse_kernel[(columns // sizes.columns, heads, batch)](
        query, key, gradient, *chunks, d_states, d_value, time, query.stride(1), key.stride(1), gradient.stride(1),
        key.shape[-1] ** -0.5, HEADS=heads, GROUP=heads // key.shape[2], K=key.shape[-1], V=columns,
        BV=sizes.columns, C=CHUNK, PRECISION=_precision(gradient), num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


def _token_rows(x: Tensor) -> Tensor:
    """x with contiguous heads and one stride over all tokens; a slice of wider rows is not copied."""
    even = x.stride(-1) == 1 and x.stride(2) == x.shape[3] and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def _precision(x: Tensor) -> str:
    """Triton's `input_precision` of products."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _walk_sizes(value: Tensor, *, backwards: bool = False) -> Sizes:
    """Launch parameters of a scan, measured on an H100; few heads get narrower programs, to fill the GPU."""
    walks, columns = value.shape[0] * value.shape[2], value.shape[3]
    if value.dtype == torch.float32:
        return Sizes(min(columns, 16), 4, 1)
    if walks >= 96:
        return Sizes(min(columns, 128), 8, 2) if backwards else Sizes(min(columns, 64), 4, 1)
    return Sizes(min(columns, 64 if walks >= 48 else 32), 4, 2)


def _gradient_sizes(value: Tensor) -> Sizes:
    columns = value.shape[3]
    return Sizes(min(columns, 16 if value.dtype == torch.float32 else 64), 8, 1)
