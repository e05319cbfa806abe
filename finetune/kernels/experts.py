"""Expert MLPs as two grouped matrix products, in place of a loop over experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from finetune.model.moe import ExpertCompute, experts_in_a_loop


class KernelError(ValueError):
    """A kernel that the recipe asks for by name cannot run on this device and dtype."""


def experts_grouped(
    rows: Float[Tensor, "rows hidden"],
    rows_per_expert: Int[Tensor, " local_experts"],
    gate_up: Float[Tensor, "local_experts two_width hidden"],
    down: Float[Tensor, "local_experts hidden width"],
) -> Float[Tensor, "rows hidden"]:
    """`experts_in_a_loop` by torch's grouped matrix product; no host synchronisation.

    Rows beyond the last expert do not exist here (rows_per_expert sums to the rows), so none is left uninitialised.
    """
    ends = rows_per_expert.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    return _ContiguousGradient.apply(F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=ends))


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous, which the backward pass of the grouped product requires."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        # Of no rows, `.contiguous()` would keep the strides of an expanded gradient.
        return gradient.contiguous() if gradient.numel() else gradient.new_empty(gradient.shape)


def choose(
    kind: str, *, hidden: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[ExpertCompute, str]:
    """The function that computes experts, and a sentence that says which and why.

    `auto` tries the grouped product at the model's own widths (it refuses rows that are no multiple of 16 bytes), on
    this device and dtype, forward and backward, and says so if it has to fall back.

    Raises:
        KernelError: `grouped` was asked for and does not run here.
    """
    if kind == "loop":
        return experts_in_a_loop, "experts: loop (the definition), as the recipe asks"
    fault = _fault(experts_grouped, hidden, width, device, dtype)
    if fault is None:
        return experts_grouped, f"experts: grouped matrix product, {dtype} on {device.type}"
    if kind == "grouped":
        raise KernelError(
            f"kernels.experts: grouped does not run in {dtype} on {device.type} at widths {hidden} and {width}"
            f" with torch {torch.__version__} ({fault}); use 'auto' or 'loop'"
        )
    return experts_in_a_loop, f"experts: SLOW loop over experts; the grouped product does not run here ({fault})"


def _fault(
    compute: Callable[..., Tensor], hidden: int, width: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why `compute` fails on three experts with the strides of training, or None."""
    rows = torch.ones(3, hidden, device=device, dtype=dtype, requires_grad=True)
    counts = torch.tensor([2, 0, 1], device=device)
    gate_up = torch.ones(3, 2 * width, hidden, device=device, dtype=dtype, requires_grad=True)
    down = torch.ones(3, hidden, width, device=device, dtype=dtype, requires_grad=True)
    try:
        compute(rows, counts, gate_up, down).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
