"""Small layers shared by every block: norms, rotary embedding, the dense gated MLP, positions of packed documents."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

GatedNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # x, gate, weight, eps


def rms_norm(x: Float[Tensor, "*any dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*any dim"]:
    """Zero-centred root-mean-square norm: x / rms(x) * (1 + weight), in float32, returned in the dtype of x.

    Source: `Qwen3NextRMSNorm`, transformers 5.23.
    """
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * (1.0 + weight.float())).to(x.dtype)


class RMSNorm(nn.Module):
    """Zero-centred root-mean-square norm; `compute` is `rms_norm` or an equivalent kernel."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.compute: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        return self.compute(x, self.weight, self.eps)


def residual_norm(
    x: Float[Tensor, "*any dim"], delta: Float[Tensor, "*any dim"], weight: Float[Tensor, " dim"], eps: float
) -> tuple[Float[Tensor, "*any dim"], Float[Tensor, "*any dim"]]:
    """x + delta, the residual stream after a sublayer, and `rms_norm` of that sum, the input of the next sublayer."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


class GatedRMSNorm(nn.Module):
    """Gated root-mean-square norm; `compute` is `gated_rms_norm` or an equivalent kernel."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.compute: GatedNorm = gated_rms_norm

    def forward(
        self, x: Float[Tensor, "*batch heads dim"], gate: Float[Tensor, "*batch groups group_dim"]
    ) -> Float[Tensor, "*batch heads dim"]:
        return self.compute(x, gate, self.weight, self.eps)


def gated_rms_norm(
    x: Float[Tensor, "*batch heads dim"],
    gate: Float[Tensor, "*batch groups group_dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
) -> Float[Tensor, "*batch heads dim"]:
    """Root-mean-square norm with a plain weight (not zero-centred), then a SiLU gate: weight * x / rms(x) * silu(gate).

    The gate has as many elements as x, in the same order; several heads may form one group.

    Source: `Qwen3NextRMSNormGated`, transformers 5.23 (norm before gate; the weight multiplies in the dtype of x).
    """
    normed = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((weight * normed.to(x.dtype)) * F.silu(gate.reshape(x.shape).float())).to(x.dtype)


class MLP(nn.Module):
    """Gated MLP: down(silu(gate x) * up x); `activate` is `swiglu` or an equivalent kernel."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activate: Callable[[Tensor, Tensor], Tensor] = swiglu

    def forward(self, x: Float[Tensor, "*any hidden"]) -> Float[Tensor, "*any hidden"]:
        return self.down_proj(self.activate(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Float[Tensor, "*any width"], up: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """silu(gate) * up."""
    return F.silu(gate) * up


def add_gated(
    routed: Float[Tensor, "tokens hidden"] | None,
    shared: Float[Tensor, "tokens hidden"],
    x: Float[Tensor, "tokens hidden"],
    gate_weight: Float[Tensor, "1 hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """routed + sigmoid(gate_weight x) * shared; without `routed`, only the gated shared expert."""
    gated = F.linear(x, gate_weight).sigmoid() * shared
    return gated if routed is None else routed + gated


def positions_in_segments(segment_ids: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Position of each token in its document: counts from 0, and restarts where the segment id changes."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rotary_table(
    positions: Int[Tensor, "batch time"], rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch time rotary"], Float[Tensor, "batch time rotary"]]:
    """Cosine and sine of position x frequency, repeated for both halves; computed in float32, returned in `dtype`.

    Source: arXiv 2104.09864; the half-split layout of `rotate_half` in transformers.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.float().unsqueeze(-1) * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch heads time dim"],
    cos: Float[Tensor, "batch time rotary"],
    sin: Float[Tensor, "batch time rotary"],
) -> Float[Tensor, "batch heads time dim"]:
    """Apply the rotary embedding to the first `rotary` dimensions of every head; the others are unchanged."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos.unsqueeze(1) + half * sin.unsqueeze(1), rest), dim=-1)
