"""Gated DeltaNet: the layer around the gated delta rule. The rule itself is in `delta_rule.py`.

Source: `Qwen3NextGatedDeltaNet`, transformers 5.23; arXiv 2412.06464.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.delta_rule import chunked_gated_delta_rule
from finetune.model.layers import GatedRMSNorm

# Always float32: bfloat16 keeps 8 bits, so a relative update of 1e-3 would be rounded away.
DECAY_RATES = (".A_log", ".dt_bias")


class Heads(NamedTuple):
    """Numbers and dimensions of the heads; values / keys consecutive value heads share a key head."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


class Prepared(NamedTuple):
    """Inputs of the delta rule, and the gate of its output."""

    query: Float[Tensor, "batch time key_heads key"]  # unit vectors, as is `key`; dtype of the projection
    key: Float[Tensor, "batch time key_heads key"]
    value: Float[Tensor, "batch time value_heads value"]
    log_decay: Float[Tensor, "batch time value_heads"]  # float32, as is `write`
    write: Float[Tensor, "batch time value_heads"]
    gate: Float[Tensor, "batch time key_heads group_value"]  # a view of the projection, grouped by key head


# qkvz, ba, convolution weight, A_log, dt_bias, segment_ids, heads
Prepare = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Heads], Prepared]


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying state per head, a short convolution before it and a gated norm after it.

    `in_proj_qkvz` and `in_proj_ba` are grouped by key head, as in the released checkpoints. The rows of key head g are
    its query, its key, the values of its value heads and their gates z. The channels of the convolution are
    queries | keys | values, not grouped. `prepare` and `rule` are the definitions or equivalent kernels.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = Heads(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        self.prepare: Prepare = prepare
        self.rule: Callable[..., Tensor] = chunked_gated_delta_rule
        hidden, channels = config.hidden_size, 2 * config.key_dim + config.value_dim
        self.in_proj_qkvz = nn.Linear(hidden, 2 * config.key_dim + 2 * config.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(hidden, 2 * self.heads.values, bias=False)
        # Holds `conv1d.weight` of the checkpoint. Never called: nn.Conv1d cannot isolate documents, so
        # `causal_convolution` reads the weight.
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads.values))
        self.dt_bias = nn.Parameter(torch.empty(self.heads.values))
        self.norm = GatedRMSNorm(self.heads.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, hidden, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time hidden"], segment_ids: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time hidden"]:
        prepared = self.prepare(
            self.in_proj_qkvz(x),
            self.in_proj_ba(x),
            self.conv1d.weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            segment_ids,
            self.heads,
        )
        out = self.rule(
            query=prepared.query,
            key=prepared.key,
            value=prepared.value,
            log_decay=prepared.log_decay,
            write=prepared.write,
            segment_ids=segment_ids,
        )
        return self.out_proj(self.norm(out.to(x.dtype), prepared.gate).flatten(-2))


def prepare(
    qkvz: Float[Tensor, "batch time grouped"],
    ba: Float[Tensor, "batch time grouped_heads"],
    conv_weight: Float[Tensor, "channels width"],
    log_rate: Float[Tensor, " value_heads"],
    bias: Float[Tensor, " value_heads"],
    segment_ids: Int[Tensor, "batch time"],
    heads: Heads,
) -> Prepared:
    """Computation between the projections and the delta rule. The definition.

    Queries, keys and values go through the convolution and SiLU; queries and keys are then L2-normalised.
    `log_decay` is computed from a, `write` is sigmoid(b).
    """
    key_dim, value_dim = heads.key_dim, heads.values // heads.keys * heads.value_dim
    qkvz = qkvz.unflatten(-1, (heads.keys, -1))
    query, key, value, gate = qkvz.split([key_dim, key_dim, value_dim, value_dim], dim=-1)
    b, a = ba.unflatten(-1, (heads.keys, -1)).chunk(2, dim=-1)

    mixed = torch.cat((query.flatten(-2), key.flatten(-2), value.flatten(-2)), dim=-1)
    mixed = F.silu(causal_convolution(mixed, conv_weight, segment_ids))
    keys = heads.keys * key_dim
    query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1)
    return Prepared(
        query=l2_normalize(query.unflatten(-1, (heads.keys, -1))),
        key=l2_normalize(key.unflatten(-1, (heads.keys, -1))),
        value=value.unflatten(-1, (heads.values, -1)),
        log_decay=log_decay(a.flatten(-2), log_rate, bias),
        write=b.flatten(-2).float().sigmoid(),
        gate=gate,
    )


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
    """Depthwise causal convolution within documents.

    y_t = sum_j weight[:, width - 1 - j] * x_{t-j} over those j for which token t - j is in the document of t.
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


def l2_normalize(x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
    """x / sqrt(sum x^2 + 1e-6), computed in float32. The released kernels add epsilon; `F.normalize` clamps."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
