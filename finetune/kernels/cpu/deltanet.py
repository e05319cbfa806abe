"""The part of a DeltaNet layer between the projections and the delta rule, in few passes over memory; for a CPU.

Plain torch. Definition: `prepare` in `model/deltanet.py`. Queries, keys and values keep the layout of the projection,
grouped by key head; the convolution's weights are permuted to match. The backward pass writes all gradients, that of
the gate included, directly into the gradient of the projection.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from finetune.model.deltanet import Heads, Prepared, log_decay


def prepare_cpu(
    qkvz: Float[Tensor, "batch time grouped"],
    ba: Float[Tensor, "batch time grouped_heads"],
    conv_weight: Float[Tensor, "channels width"],
    log_rate: Float[Tensor, " value_heads"],
    bias: Float[Tensor, " value_heads"],
    segment_ids: Int[Tensor, "batch time"],
    heads: Heads,
) -> Prepared:
    """Equivalent of `finetune.model.deltanet.prepare`. Branches on the values of the segment ids."""
    b, a = ba.unflatten(-1, (heads.keys, -1)).chunk(2, dim=-1)
    query, key, value, gate = _Convolved.apply(qkvz, conv_weight, segment_ids, heads)
    decay = log_decay(a.flatten(-2), log_rate, bias)
    return Prepared(query, key, value, decay, b.flatten(-2).float().sigmoid(), gate)


class _Convolved(torch.autograd.Function):
    """Convolution, SiLU and L2 norm. Saves the input of SiLU; saves the projection only if the weight is trained."""

    @staticmethod
    def forward(ctx, qkvz, conv_weight, segment_ids, heads):  # type: ignore[no-untyped-def]
        group = heads.values // heads.keys
        channels = 2 * heads.key_dim + group * heads.value_dim
        mixed, gate = qkvz.unflatten(-1, (heads.keys, -1)).tensor_split([channels], dim=-1)
        taps = _by_group(conv_weight, heads)
        before = torch.mul(mixed.float(), taps[0])
        for back, tap in enumerate(taps[1 : mixed.shape[1]], 1):
            before[:, back:].addcmul_(_of_same_document(mixed[:, :-back].float(), segment_ids, back), tap)
        before = before.to(qkvz.dtype)
        value = F.silu(before[..., 2 * heads.key_dim :]).view(*qkvz.shape[:2], heads.values, heads.value_dim)
        long = F.silu(before[..., : 2 * heads.key_dim]).unflatten(-1, (2, heads.key_dim)).float()
        shorter = long.square().sum(-1, keepdim=True).add_(1e-6).rsqrt_()
        unit = (long * shorter).to(qkvz.dtype)
        ctx.save_for_backward(before, unit, shorter, taps, segment_ids, qkvz if ctx.needs_input_grad[1] else None)
        ctx.heads, ctx.weight_dtype, ctx.width = heads, conv_weight.dtype, qkvz.shape[-1]
        return *unit.unbind(-2), value, gate

    @staticmethod
    def backward(ctx, d_query, d_key, d_value, d_gate):  # type: ignore[no-untyped-def]
        before, unit, shorter, taps, segment_ids, qkvz = ctx.saved_tensors
        heads, dtype = ctx.heads, before.dtype
        d_unit = torch.stack((d_query, d_key), dim=-2).float()
        d_long = d_unit.addcmul_(unit, (d_unit * unit).sum(-1, keepdim=True), value=-1).mul_(shorter)
        d_before = torch.empty_like(before)
        for given, start, end, shape in (
            (d_long.to(dtype), 0, 2 * heads.key_dim, (2, heads.key_dim)),
            (d_value.unflatten(2, (heads.keys, -1)), 2 * heads.key_dim, before.shape[-1], (-1, heads.value_dim)),
        ):
            entered, wanted = (x[..., start:end].unflatten(-1, shape) for x in (before, d_before))
            torch.ops.aten.silu_backward.grad_input(given, entered, grad_input=wanted)
        d_before = d_before.float()

        d_qkvz = before.new_empty(*before.shape[:3], ctx.width // heads.keys)
        d_mixed, d_rest = d_qkvz.tensor_split([before.shape[-1]], dim=-1)
        d_rest.copy_(d_gate)
        total = d_mixed if dtype == torch.float32 else torch.empty_like(d_before)
        torch.mul(d_before, taps[0], out=total)
        for back, tap in enumerate(taps[1 : before.shape[1]], 1):
            total[:, :-back].addcmul_(_of_same_document(d_before[:, back:], segment_ids, back), tap)
        if total is not d_mixed:
            d_mixed.copy_(total)
        d_weight = None
        if qkvz is not None:
            mixed = qkvz.unflatten(-1, (heads.keys, -1))[..., : before.shape[-1]].float()
            d_weight = _weight_gradient(mixed, d_before, segment_ids, heads, len(taps)).to(ctx.weight_dtype)
        return d_qkvz.flatten(-2), d_weight, None, None


def _of_same_document(
    x: Float[Tensor, "batch fewer heads channels"], segment_ids: Int[Tensor, "batch time"], back: int
) -> Float[Tensor, "batch fewer heads channels"]:
    """x, with zeros at pairs of tokens `back` apart that belong to different documents."""
    other = segment_ids[:, back:] != segment_ids[:, :-back]
    return x.masked_fill(other[..., None, None], 0) if other.any() else x


def _by_group(weight: Float[Tensor, "channels width"], heads: Heads) -> Float[Tensor, "width key_heads group"]:
    """Weights in the channel order of the projection; taps from the token itself backwards."""
    keys, values = heads.keys * heads.key_dim, heads.values * heads.value_dim
    parts = (part.unflatten(0, (heads.keys, -1)) for part in weight.float().split([keys, keys, values]))
    return torch.cat(list(parts), dim=1).permute(2, 0, 1).flip(0).contiguous()


def _weight_gradient(
    mixed: Float[Tensor, "batch time key_heads group"],
    d_out: Float[Tensor, "batch time key_heads group"],
    segment_ids: Int[Tensor, "batch time"],
    heads: Heads,
    width: int,
) -> Float[Tensor, "channels width"]:
    """Gradient of the convolution's weight, summed over all tokens, in the order of the weight."""
    by_tap = d_out.new_zeros(width, *d_out.shape[2:])
    for back in range(min(width, d_out.shape[1])):
        earlier = mixed[:, :-back] if back else mixed
        given = _of_same_document(d_out[:, back:], segment_ids, back) if back else d_out
        by_tap[back] = (given * earlier).sum((0, 1))
    dims = [heads.key_dim, heads.key_dim, heads.values // heads.keys * heads.value_dim]
    by_channel = by_tap.flip(0).permute(1, 2, 0).split(dims, dim=1)
    return torch.cat([part.flatten(0, 1) for part in by_channel])
