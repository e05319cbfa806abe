"""Expert parallelism: `exchange_locally` across the ranks of one process group, and which parameters it concerns.

Rank r of the group holds experts [r * n, (r + 1) * n). Rows travel to their expert's rank and back in two all-to-alls.
"""

from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from finetune.model.moe import Dispatched, MoE, Routing, combine, sort_by_expert


def attach(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make every MoE block of `model` exchange rows over `group`."""
    for block in model.modules():
        if isinstance(block, MoE):
            block.exchange = partial(exchange_over, group)


def is_expert_parameter(name: str) -> bool:
    """Whether this parameter is different on every expert rank: the stacked experts, or factors that adapt them."""
    return ".mlp.experts." in name


def exchange_over(group: dist.ProcessGroup, x: Float[Tensor, "tokens hidden"], routing: Routing) -> Dispatched:
    """Rows to the ranks of their experts, and back. Three all-to-alls (counts, rows, results), one host wait."""
    order, token = sort_by_expert(routing.experts)
    chosen = routing.experts.flatten()
    # Not bincount, which waits for a GPU to learn the largest value.
    sent = chosen.new_zeros(routing.logits.shape[-1]).scatter_add(0, chosen, torch.ones_like(chosen))
    sent = sent.view(group.size(), -1)  # (ranks, local experts)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    outward, inward = torch.stack((sent.sum(1), received.sum(1))).tolist()  # the one host synchronisation of the layer

    rows = _Swap.apply(x[token], outward, inward, group)
    # Rows arrive grouped by the rank that sent them; the experts want them grouped by expert.
    local_expert = (
        torch.arange(sent.shape[1], device=x.device)
        .repeat(group.size())
        .repeat_interleave(received.flatten(), output_size=sum(inward))
    )
    by_expert = local_expert.argsort(stable=True)

    def restore(rows: Tensor) -> Tensor:
        rows = torch.empty_like(rows).index_copy(0, by_expert, rows)
        return combine(_Swap.apply(rows, inward, outward, group), order, routing.weights)

    return Dispatched(rows[by_expert], received.sum(0), restore)


class _Swap(torch.autograd.Function):
    """Send `send[r]` rows to each rank r and return the rows received; the gradient travels the other way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group  # type: ignore[attr-defined]
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.send, ctx.receive, ctx.group  # type: ignore[attr-defined]
        out = gradient.new_empty(sum(send), gradient.shape[1])
        dist.all_to_all_single(out, gradient.contiguous(), send, receive, group=group)
        return out, None, None, None
