"""A frozen linear layer and its low-rank adapter in one function: fewer passes over the output, nothing saved twice.

Plain torch; runs on every device. Definition: `forward` of peft's `lora.Linear`, which scales the adapter's output and
adds it to that of the layer in two further passes.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def adapted_linear(
    x: Float[Tensor, "*any inputs"],
    weight: Float[Tensor, "outputs inputs"],
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "outputs rank"],
    scale: float,
) -> Float[Tensor, "*any outputs"]:
    """W x + scale * B (A x), all in one dtype; `weight` is frozen and gets no gradient."""
    return _AdaptedLinear.apply(x, weight, a, b, scale)


class _AdaptedLinear(torch.autograd.Function):
    """Writes the low-rank product to the output first; the large product accumulates onto it (`addmm_`)."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale):  # type: ignore[no-untyped-def]
        assert not ctx.needs_input_grad[1], "the layer beside an adapter is frozen"
        rows = x.reshape(-1, x.shape[-1])
        thin = torch.mm(rows, a.t()).mul_(scale)
        out = torch.mm(thin, b.t()).addmm_(rows, weight.t())
        ctx.save_for_backward(x, thin, weight, a, b)  # x, not its reshape: layers with the same x share it
        ctx.scale = scale
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, thin, weight, a, b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _ = ctx.needs_input_grad
        given = gradient.reshape(-1, len(weight))
        d_x = d_a = d_b = None
        if needs_b:
            d_b = torch.mm(given.t(), thin)
        if needs_x or needs_a:
            d_thin = torch.mm(given, b).mul_(ctx.scale)
            if needs_a:
                d_a = torch.mm(d_thin.t(), x.reshape(-1, x.shape[-1]))
            if needs_x:
                d_x = torch.mm(d_thin, a).addmm_(given, weight).view(x.shape)
        return d_x, None, d_a, d_b, None
