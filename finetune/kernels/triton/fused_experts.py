"""Expert MLPs as four grouped matrix products with fused gather, SwiGLU, routing weights and scatter; Triton.

Forward: rows are gathered as they are loaded, SwiGLU is computed on the accumulators, and the routing weight is applied
before a row is stored. A row is stored at its slot (token, choice), so that combining sums adjacent rows.
Backward: one product gives the gradients of the activation, SwiGLU and the routing weight; another gives the gradient
of the rows. Weight gradients of frozen experts are not computed. Besides the inputs, the forward pass saves only the
pre-activations and the low-rank products of adapters.

The forward pass consists of two autograd functions; only the first, up to SwiGLU, saves tensors. Since
`torch.utils.checkpoint` stops recomputing at the last saved tensor, a recomputed layer does not repeat the
down-projection.

Definition: `finetune.model.moe.experts_in_a_loop` between dispatch and combine of `exchange_locally`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from finetune.kernels.triton.expert_products import combine, grouped_product, up_backward, up_product, weight_gradient
from finetune.kernels.triton.tiles import Rows, cut
from finetune.model.moe import ExpertFactors, LowRank, Routing


def moe_fused(
    x: Float[Tensor, "tokens hidden"],
    routing: Routing,
    gate_up: Float[Tensor, "experts two_width hidden"],
    down: Float[Tensor, "experts hidden width"],
    factors: ExpertFactors | None,
    addend: Float[Tensor, "tokens hidden"] | None,
) -> Float[Tensor, "tokens hidden"]:
    """addend + the routed experts of a device that holds all of them: sort, experts, weighted sum.

    No host synchronisation.
    """
    narrow = torch.int16 if len(gate_up) < 2**15 else torch.int32  # a radix sort of 2-byte keys has two passes
    slot = routing.experts.flatten().to(narrow).sort(stable=True).indices
    rows = cut(slot, routing.experts.shape[1], routing.rows, len(slot), x.dtype)
    return _experts(x, routing.weights, rows, gate_up, down, factors, addend)


def experts_fused(
    rows: Float[Tensor, "rows hidden"],
    rows_per_expert: Int[Tensor, " local_experts"],
    gate_up: Float[Tensor, "local_experts two_width hidden"],
    down: Float[Tensor, "local_experts hidden width"],
    factors: ExpertFactors | None = None,
) -> Float[Tensor, "rows hidden"]:
    """Equivalent of `experts_in_a_loop`, for rows already sorted by expert, as received from other ranks."""
    return _experts(rows, None, cut(None, 1, rows_per_expert, len(rows), rows.dtype), gate_up, down, factors, None)


def _experts(
    x: Tensor, weights: Tensor | None, rows: Rows, gate_up: Tensor, down: Tensor,
    factors: ExpertFactors | None, addend: Tensor | None,
) -> Tensor:  # fmt: skip
    a1 = b1 = a2 = b2 = None
    if factors is not None:
        (a1, b1), (a2, b2) = _filled(factors.gate_up), _filled(factors.down)
    scale = factors.gate_up.scale if factors is not None else 0.0
    carrier, act = _Up.apply(x, weights, rows, gate_up, down, a1, b1, a2, b2, scale)
    return _Down.apply(carrier, act, weights, rows, down, a2, b2, scale, addend)


class _Up(torch.autograd.Function):
    """Forward: x -> silu(gate) * up of every row. Backward: the whole backward pass of the experts.

    Returns the activations, which `_Down` reads, and a carrier. The carrier is an expanded scalar with the shape of the
    experts' output; it passes the output's gradient to this backward pass.
    """

    @staticmethod
    def forward(ctx, x, weights, rows, gate_up, down, a1, b1, a2, b2, scale):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        thin = None if a1 is None else grouped_product(x, a1, rows, gathered=True, scale=scale)
        keep = any(ctx.needs_input_grad)
        act, pre = up_product(x, gate_up, rows, thin, b1, keep=keep)
        ctx.rows, ctx.scale = rows, scale
        ctx.save_for_backward(x, weights, gate_up, down, a1, b1, a2, b2, pre, thin)
        ctx.mark_non_differentiable(act)
        return x.new_zeros(()).expand(x.shape), act

    @staticmethod
    def backward(ctx, gradient, _):  # type: ignore[no-untyped-def]
        x, weights, gate_up, down, a1, b1, a2, b2, pre, thin = ctx.saved_tensors
        rows, scale = ctx.rows, ctx.scale
        need = ctx.needs_input_grad
        gradient = gradient.contiguous()
        by_row = None if a2 is None else grouped_product(gradient, b2.transpose(1, 2), rows, gathered=True, scale=scale)
        trains = need[4] or a2 is not None  # the gradients of down or its factors need the activations
        d_pre, d_weights, act = up_backward(gradient, down, pre, rows, weights, by_row, a2, keep=trains)
        d_thin = None if a1 is None else grouped_product(d_pre, b1.transpose(1, 2), rows, gathered=False, scale=scale)
        d_x = None
        if need[0]:
            factor = None if a1 is None else a1.transpose(1, 2)
            d_rows = grouped_product(d_pre, gate_up.transpose(1, 2), rows, thin=d_thin, factor=factor, scatter=True)
            d_x = combine(d_rows, rows, None)
        d_gate_up = d_down = d_a1 = d_b1 = d_a2 = d_b2 = None
        if need[3] or a1 is not None:
            x_rows = _gather(x, rows)
            d_gate_up = weight_gradient(d_pre, x_rows, rows) if need[3] else None
            if d_thin is not None and thin is not None:
                d_a1, d_b1 = weight_gradient(d_thin, x_rows, rows), weight_gradient(d_pre, thin, rows)
        if act is not None:
            # act includes the routing weight, so neither the rows of the gradient nor its product with B must.
            g_rows = _gather(gradient, rows)
            d_down = weight_gradient(g_rows, act, rows) if need[4] else None
            if by_row is not None:
                d_a2 = weight_gradient(by_row, act, rows)
                d_b2 = weight_gradient(g_rows, grouped_product(act, a2, rows, gathered=False, scale=scale), rows)
        return d_x, d_weights, None, d_gate_up, d_down, d_a1, d_b1, d_a2, d_b2, None


class _Down(torch.autograd.Function):
    """Activations -> weighted sum over each token's rows. Saves no tensors; passes its gradient to the carrier."""

    @staticmethod
    def forward(ctx, carrier, act, weights, rows, down, a2, b2, scale, addend):  # type: ignore[no-untyped-def]
        thin = None if a2 is None else grouped_product(act, a2, rows, gathered=False, scale=scale)
        return combine(
            grouped_product(act, down, rows, thin=thin, factor=b2, weights=weights, scatter=True), rows, addend
        )

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, *[None] * 7, gradient if ctx.needs_input_grad[8] else None


def _filled(factors: LowRank) -> tuple[Tensor, Tensor]:
    """A and B, zero-padded to a rank of a multiple of 16 bytes, which torch's grouped product requires."""
    fill = -factors.a.shape[1] % (16 // factors.a.element_size())
    return (F.pad(factors.a, (0, 0, 0, fill)), F.pad(factors.b, (0, fill))) if fill else (factors.a, factors.b)


def _gather(x: Tensor, rows: Rows) -> Tensor:
    return x if rows.slot is None else x[rows.slot // rows.top_k]
