"""Gated softmax attention: partial rotary embedding, RMS-normed queries and keys, a sigmoid gate on the output.

Source: `Qwen3NextAttention`, transformers 5.23.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.attention.varlen  # registers torch.ops.torch_attn
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.layers import RMSNorm, rms_norm, rotate


class Packing(NamedTuple):
    """How documents are packed; the input of `Isolate`. A run of padding counts as a document."""

    segment_ids: Int[Tensor, "batch time"]
    documents: int
    longest: int  # tokens of the longest document


class Documents(NamedTuple):
    """Document boundaries in the flattened batch, for attention kernels that take cumulative lengths, not a mask."""

    starts: Int[Tensor, " documents_1"]  # int32; first token of each document, then the number of tokens
    longest: int  # tokens of the longest document


Isolation = Bool[Tensor, "batch 1 time time"] | Documents
Isolate = Callable[[Packing], Isolation]

# Attention operators of this torch that do not store the scores. Their outputs are saved even where the layer is
# recomputed: recomputing attention costs O(sequence length) a token, storing its output O(1).
PRODUCTS = [
    getattr(operators, name).default
    for operators, name in (
        (torch.ops.aten, "_scaled_dot_product_cudnn_attention"),
        (torch.ops.aten, "_scaled_dot_product_efficient_attention"),
        (torch.ops.aten, "_scaled_dot_product_flash_attention"),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        (torch.ops.torch_attn, "_varlen_attn"),
    )
    if hasattr(operators, name)
]


class GatedAttention(nn.Module):
    """Causal attention within documents. The rows of a head in `q_proj` are its query, then its output gate.

    `prepare`, `attend_packed` and `gate_output` are the definitions or equivalent kernels. `attend_packed` takes the
    result of the model's `isolate`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, 2 * queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.prepare: Callable[..., tuple[Tensor, Tensor, Tensor]] = prepare
        self.attend_packed: Callable[..., Tensor] = attend_masked
        self.gate_output: Callable[[Tensor, Tensor], Tensor] = gate_output

    def forward(
        self,
        x: Float[Tensor, "batch time hidden"],
        cos: Float[Tensor, "batch time rotary"],
        sin: Float[Tensor, "batch time rotary"],
        isolation: Isolation | None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Apply the layer.

        Args:
            isolation: attention mask or document boundaries; None if every sequence is one document.
        """
        weights = self.q_norm.weight, self.k_norm.weight
        query, key, gate = self.prepare(self.q_proj(x), self.k_proj(x), cos, sin, *weights, self.q_norm.eps)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = attend(query, key, value) if isolation is None else self.attend_packed(query, key, value, isolation)
        return self.o_proj(self.gate_output(out, gate))


def prepare(
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
    """Norm and rotary embedding between the projections and attention. The definition.

    Args:
        q_gate: output of `q_proj`.
        key: output of `k_proj`.
        q_weight: weight of the query norm; `k_weight` is that of the key norm.

    Returns:
        Queries and keys, normed and rotated; and the output gates before the sigmoid.
    """
    query, gate = q_gate.unflatten(-1, (-1, 2 * len(q_weight))).chunk(2, dim=-1)
    key = key.unflatten(-1, (-1, len(k_weight)))
    query, key = (rms_norm(x, w, eps).transpose(1, 2) for x, w in ((query, q_weight), (key, k_weight)))
    return rotate(query, cos, sin).transpose(1, 2), rotate(key, cos, sin).transpose(1, 2), gate


def attend(
    query: Float[Tensor, "batch time heads dim"],
    key: Float[Tensor, "batch time kv_heads dim"],
    value: Float[Tensor, "batch time kv_heads dim"],
) -> Float[Tensor, "batch time heads dim"]:
    """Causal attention, every sequence one document."""
    if query.is_cuda and query.dtype == torch.float32:  # its kernel for grouped keys stores all scores
        key, value = _for_every_head(query, key), _for_every_head(query, value)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_masked(
    query: Float[Tensor, "batch time heads dim"],
    key: Float[Tensor, "batch time kv_heads dim"],
    value: Float[Tensor, "batch time kv_heads dim"],
    isolation: Bool[Tensor, "batch 1 time time"],
) -> Float[Tensor, "batch time heads dim"]:
    """Attention under a boolean mask (True: may attend). The definition for several documents a sequence."""
    # Only cuDNN supports a mask with grouped keys, and not at every head size; the fallback stores all scores. With
    # keys and values repeated for every query head, the memory-efficient kernel applies.
    key, value = _for_every_head(query, key), _for_every_head(query, value)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=isolation).transpose(1, 2)


def _for_every_head(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values, each head repeated for the query heads that share it."""
    return key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)


def gate_output(
    out: Float[Tensor, "batch time heads dim"], gate: Float[Tensor, "batch time heads dim"]
) -> Float[Tensor, "batch time hidden"]:
    """out * sigmoid(gate), with the heads concatenated."""
    return (out * gate.sigmoid()).flatten(-2)


def document_mask(packing: Packing) -> Bool[Tensor, "batch 1 time time"]:
    """Causal mask within documents: True where query (row) may attend to key (column). time^2 bytes a sequence."""
    same = packing.segment_ids.unsqueeze(-1) == packing.segment_ids.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def has_several_documents(segment_ids: Int[Tensor, "batch time"], padding: int) -> Int[Tensor, ""]:
    """Number of tokens in the second and later documents of their sequences; 0 if causal attention needs no mask.

    Padding after the only document needs no mask: no token attends to it, and its outputs are not used.
    """
    return ((segment_ids != segment_ids[:, :1]) & (segment_ids != padding)).sum()
