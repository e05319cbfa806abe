"""Expert parallelism: dispatch and combine across the ranks of one process group, and which parameters it concerns.

Rank r of the group holds experts [r * n, (r + 1) * n). Rows are dispatched and combined by two all-to-alls; a small
third one, sent first, exchanges their sizes. All are asynchronous: computation between the start of one and the wait
for it overlaps with the transfer, in the forward and the backward pass.

Definition: `finetune.model.moe.exchange_locally`.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from finetune.model.moe import Dispatched, MoE, Routing, combine, permuted, put_back, rows_of, sort_by_expert


def attach(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Set the exchange of every MoE block of `model` to that over `group`."""
    for block in model.modules():
        if isinstance(block, MoE):
            block.exchange = partial(exchange_over, group)


def is_expert_parameter(name: str) -> bool:
    """Whether this parameter is partitioned over expert ranks: the stacked experts and their adapters."""
    return ".mlp.experts." in name


def is_marked(parameter: Tensor) -> bool:
    """Whether `engine.mark_experts` has marked this parameter as partitioned, for DeepSpeed."""
    return not getattr(parameter, "allreduce", True)


def exchange_over(
    group: dist.ProcessGroup, x: Float[Tensor, "tokens hidden"], routing: Routing
) -> Callable[[], Dispatched]:
    """Dispatch rows to the ranks of their experts. One host synchronisation, for the counts. Collective.

    Returns:
        A function that waits for the rows of this rank. Call its result's `restore` to combine the outputs.
    """
    sent = routing.rows.view(group.size(), -1)  # (ranks, local experts)
    received = torch.empty_like(sent)
    counting = dist.all_to_all_single(received, sent, group=group, async_op=True)
    order = sort_by_expert(routing.experts)
    leaving = rows_of(x, order, routing.experts.shape[1])
    counting.wait()
    outward, inward = torch.stack((sent.sum(1), received.sum(1))).tolist()  # the only host synchronisation

    way_there, way_back = _Way(group, outward, inward), _Way(group, inward, outward)
    ticket = _Depart.apply(leaving, way_there)
    # Received rows are grouped by source rank; the experts require them grouped by expert.
    local_expert = (
        torch.arange(sent.shape[1], device=x.device)
        .repeat(group.size())
        .repeat_interleave(received.flatten(), output_size=sum(inward))
    )
    by_expert = local_expert.argsort(stable=True)

    def restore(rows: Tensor) -> Tensor:
        returned = _Arrive.apply(_Depart.apply(put_back(rows, by_expert), way_back), way_back)
        return combine(returned, order, routing.weights)

    def arrive() -> Dispatched:
        rows = _Arrive.apply(ticket, way_there)
        return Dispatched(permuted(rows, by_expert), received.sum(0), restore)

    return arrive


class _Way:
    """An asynchronous all-to-all of rows, with a start and a finish, and its reverse; at most one is in flight."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]):
        self.group, self.send, self.receive = group, send, receive
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, reverse: bool = False) -> None:
        """Start sending `send[r]` rows to each rank r; in reverse, `receive[r]` rows."""
        assert self._under_way is None, "rows are under way already"
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(out, rows, receive, send, group=self.group, async_op=True)
        self._under_way = work, out, rows  # keeps the send buffer alive

    def finish(self) -> Tensor:
        """Wait for the transfer and return the received rows. On a GPU the stream waits, not the host."""
        assert self._under_way is not None, "no rows are under way"
        work, out, _ = self._under_way
        work.wait()
        self._under_way = None
        return out


class _Depart(torch.autograd.Function):
    """Starts the all-to-all; the backward finishes that of the gradient. Returns an empty tensor, for autograd only."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way  # type: ignore[attr-defined]
        way.start(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: FunctionCtx, _: Tensor) -> tuple[Tensor, None]:
        gradient: Tensor = ctx.way.finish()  # type: ignore[attr-defined]
        return gradient, None


class _Arrive(torch.autograd.Function):
    """Finishes the all-to-all; the backward starts that of the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, ticket: Tensor, way: _Way) -> Tensor:
        ctx.way = way  # type: ignore[attr-defined]
        return way.finish()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.way.start(gradient, reverse=True)  # type: ignore[attr-defined]
        return gradient.new_empty(0), None
