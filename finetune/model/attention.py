"""Gated softmax attention: partial rotary embedding, normalised queries and keys, a sigmoid gate on the output.

Source: `Qwen3NextAttention`, transformers 5.23.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.layers import RMSNorm, rotate


class GatedAttention(nn.Module):
    """Causal attention within documents; `q_proj` gives each head its query and its gate, in that order."""

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

    def forward(
        self,
        x: Float[Tensor, "batch time hidden"],
        cos: Float[Tensor, "batch time rotary"],
        sin: Float[Tensor, "batch time rotary"],
        mask: Bool[Tensor, "batch 1 time time"] | None,
    ) -> Float[Tensor, "batch time hidden"]:
        query, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        key = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        query = rotate(self.q_norm(query).transpose(1, 2), cos, sin)  # (batch, heads, time, dim)
        key = rotate(key.transpose(1, 2), cos, sin)
        value = value.transpose(1, 2)
        if mask is not None:
            # Only cuDNN takes a mask together with grouped keys, and not at every head size; the kernel that all other
            # GPUs would fall back to keeps every score. With equal heads the memory-efficient kernel serves.
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None
        )
        return self.o_proj((out.transpose(1, 2) * gate.sigmoid()).flatten(-2))


def document_mask(segment_ids: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch 1 time time"]:
    """Who may look at whom: earlier or equal position, same document. time^2 bytes per sequence of the batch."""
    same = segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def has_several_documents(segment_ids: Int[Tensor, "batch time"], padding: int) -> Int[Tensor, ""]:
    """How many positions keep plain causal attention from serving: tokens of a sequence's second document and later.

    Padding may follow the document: no token looks ahead to it, and what it computes is read by nobody.
    """
    return ((segment_ids != segment_ids[:, :1]) & (segment_ids != padding)).sum()
