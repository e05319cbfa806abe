"""Gated DeltaNet: the module around the gated delta rule. The rule itself is in `delta_rule.py`.

Source: `Qwen3NextGatedDeltaNet`, transformers 5.23; arXiv 2412.06464.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.layers import GatedRMSNorm

# Always float32: at bfloat16 a decay rate has 8 bits, and an update of a thousandth of it is lost.
DECAY_RATES = (".A_log", ".dt_bias")


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying state per head, a short convolution before it and a gated norm after it.

    `in_proj_qkvz` and `in_proj_ba` are grouped by key head, as released: the rows of key head g are its query, its
    key, the values of its value heads and their gates z; the convolution runs over the flat queries | keys | values.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        hidden, channels = config.hidden_size, 2 * config.key_dim + config.value_dim
        self.in_proj_qkvz = nn.Linear(hidden, 2 * config.key_dim + 2 * config.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(hidden, 2 * self.value_heads, bias=False)
        # Holds the released `conv1d.weight`; `causal_convolution` below reads it, since nn.Conv1d knows no documents.
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = GatedRMSNorm(self.value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], segment_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time hidden"]:
        group = self.value_heads // self.key_heads  # value heads that share one key head
        key_dim, value_dim = self.key_head_dim, group * self.value_head_dim
        qkvz = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, -1))
        query, key, value, gate = qkvz.split([key_dim, key_dim, value_dim, value_dim], dim=-1)
        write, decay = self.in_proj_ba(x).unflatten(-1, (self.key_heads, -1)).chunk(2, dim=-1)

        mixed = torch.cat((query.flatten(-2), key.flatten(-2), value.flatten(-2)), dim=-1)
        mixed = F.silu(causal_convolution(mixed, self.conv1d.weight.squeeze(1), segment_ids))
        keys = self.key_heads * key_dim
        query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1)

        out = chunked_gated_delta_rule(
            query=query.unflatten(-1, (self.key_heads, -1)).repeat_interleave(group, dim=2),
            key=key.unflatten(-1, (self.key_heads, -1)).repeat_interleave(group, dim=2),
            value=value.unflatten(-1, (self.value_heads, -1)),
            log_decay=log_decay(decay.flatten(-2), self.A_log, self.dt_bias),
            write=write.flatten(-2).sigmoid(),
            segment_ids=segment_ids,
        )
        gate = gate.reshape(*x.shape[:2], self.value_heads, self.value_head_dim)
        return self.out_proj(self.norm(out.to(x.dtype), gate).flatten(-2))


def log_decay(
    a: Float[Tensor, "batch time heads"], log_rate: Float[Tensor, " heads"], bias: Float[Tensor, " heads"]
) -> Float[Tensor, "batch time heads"]:
    """log a_t = -exp(A_log) softplus(a + dt_bias), in float32; at most 0."""
    return -log_rate.float().exp() * F.softplus(a.float() + bias.float())


def causal_convolution(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels width"],
    segment_ids: Int[Tensor, "batch time"],
) -> Float[Tensor, "batch time channels"]:
    """Depthwise causal convolution that reads nothing from before the document of its token.

    y_t = sum_j weight[:, width - 1 - j] * x_{t-j} over those j whose token t - j lies in the document of t.
    Summed in float32, returned in the dtype of x.
    """
    width, time = weight.shape[1], x.shape[1]
    weight = weight.float()
    out = x.float() * weight[:, width - 1]
    for back in range(1, min(width, time)):
        same = segment_ids[:, back:] == segment_ids[:, :-back]
        earlier = x[:, :-back].float() * same.unsqueeze(-1) * weight[:, width - 1 - back]
        out = out + F.pad(earlier, (0, 0, back, 0))
    return out.to(x.dtype)
