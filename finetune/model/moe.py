"""Mixture of experts: the router, the expert weights, and the block that joins them.

Single-device mathematics. `MoE.exchange` dispatches rows to their experts and returns its own inverse, which combines
them; `distributed/expert_exchange.py` provides the one that crosses ranks.

Source: `Qwen3NextSparseMoeBlock`, transformers 5.23.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.layers import MLP, add_gated


class Routing(NamedTuple):
    """The router's decisions for the tokens of a batch; padding is not included."""

    experts: Int[Tensor, "tokens top_k"]  # chosen expert ids, most probable first
    weights: Float[Tensor, "tokens top_k"]  # routing weight of each chosen expert
    rows: Int[Tensor, " experts"]  # number of tokens that chose each expert
    probability_sum: Float[Tensor, " experts"]  # float64, router probabilities summed over the tokens, no gradient
    z_sum: Float[Tensor, ""]  # float64, squared log-sum-exp of the logits summed over the tokens, no gradient
    # float32, before softmax, input of the router losses; None if no loss uses them, to save memory
    logits: Float[Tensor, "tokens experts"] | None


class Dispatched(NamedTuple):
    """Rows for the experts of this device, and the function that combines their outputs."""

    rows: Float[Tensor, "rows hidden"]  # sorted by local expert
    rows_per_expert: Int[Tensor, " local_experts"]
    restore: Callable[[Tensor], Tensor]  # (rows, hidden) -> (tokens, hidden), weighted and summed over top_k


class LowRank(NamedTuple):
    """Low-rank adapter of one matrix of every local expert: W_e becomes W_e + scale * B_e A_e."""

    a: Float[Tensor, "local_experts rank inputs"]
    b: Float[Tensor, "local_experts outputs rank"]
    scale: float


class ExpertFactors(NamedTuple):
    """Low-rank adapters of the local experts."""

    gate_up: LowRank
    down: LowRank


# Starts the dispatch of rows to their experts; the returned function waits for the rows of this device.
Exchange = Callable[[Tensor, Routing], Callable[[], Dispatched]]
# (rows sorted by expert, rows per expert, gate_up, down, factors) -> outputs of the experts.
ExpertCompute = Callable[[Tensor, Tensor, Tensor, Tensor, ExpertFactors | None], Tensor]
# (tokens, routing, gate_up, down, factors, addend) -> addend + weighted sum over the experts of each token.
LocalCompute = Callable[[Tensor, Routing, Tensor, Tensor, ExpertFactors | None, Tensor], Tensor]
# (tokens, router weight, top k, whether to normalise the routing weights) -> routing.
Route = Callable[[Tensor, Tensor, int, bool], Routing]


def exchange_locally(x: Float[Tensor, "tokens hidden"], routing: Routing) -> Callable[[], Dispatched]:
    """Exchange for a device that holds every expert: sort rows by expert; combine by undoing the sort."""
    order = sort_by_expert(routing.experts)
    arrived = Dispatched(
        rows_of(x, order, routing.experts.shape[1]), routing.rows, lambda rows: combine(rows, order, routing.weights)
    )
    return lambda: arrived


def sort_by_expert(experts: Int[Tensor, "tokens top_k"]) -> Int[Tensor, " rows"]:
    """Stable order of the flattened (token, choice) slots by expert."""
    return experts.flatten().argsort(stable=True)


def rows_of(x: Float[Tensor, "tokens hidden"], order: Int[Tensor, " rows"], top_k: int) -> Float[Tensor, "rows hidden"]:
    """The token row of every slot, in the given order of slots."""
    return _Rows.apply(x, order, inverse(order), top_k)


def permuted(rows: Float[Tensor, "rows hidden"], order: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
    """rows[order]."""
    return _Permuted.apply(rows, order, inverse(order))


def put_back(rows: Float[Tensor, "rows hidden"], order: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
    """The inverse of `permuted`."""
    return _Permuted.apply(rows, inverse(order), order)


def inverse(order: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The inverse permutation of `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Permuted(torch.autograd.Function):
    """rows[there] for a permutation. Its gradient is a gather; that of indexing is a slow scatter-add."""

    @staticmethod
    def forward(ctx, rows, there, back):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        return rows[there]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient[ctx.saved_tensors[0]], None, None


class _Rows(torch.autograd.Function):
    """x[order // top_k]. The gradient sums each token's rows in a fixed order, so it is deterministic."""

    @staticmethod
    def forward(ctx, x, order, back, top_k):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (back,) = ctx.saved_tensors
        by_token = gradient[back].view(len(back) // ctx.top_k, ctx.top_k, gradient.shape[1])
        return by_token.sum(1), None, None, None


def combine(
    rows: Float[Tensor, "rows hidden"], order: Int[Tensor, " rows"], weights: Float[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens hidden"]:
    """Undo the sort by expert and sum each token's rows, weighted by the routing weights."""
    slots = put_back(rows, order).view(*weights.shape, rows.shape[-1])
    return (slots * weights.unsqueeze(-1)).sum(1)


def experts_in_a_loop(
    rows: Float[Tensor, "rows hidden"],
    rows_per_expert: Int[Tensor, " local_experts"],
    gate_up: Float[Tensor, "local_experts two_width hidden"],
    down: Float[Tensor, "local_experts hidden width"],
    factors: ExpertFactors | None = None,
) -> Float[Tensor, "rows hidden"]:
    """down_e(silu(gate_e x) * up_e x) for rows sorted by expert, one expert after the other. The definition.

    Every expert is computed, even without rows, so that every rank builds the same graph. One host synchronisation.

    Args:
        factors: low-rank adapters; each product W_e x becomes W_e x + scale * B_e (A_e x).
    """

    def product(x: Tensor, expert: int, weight: Tensor, low_rank: LowRank | None) -> Tensor:
        y = F.linear(x, weight[expert])
        if low_rank is None:
            return y
        return y + low_rank.scale * F.linear(F.linear(x, low_rank.a[expert]), low_rank.b[expert])

    on_gate_up, on_down = factors or (None, None)
    out = []
    for expert, x in enumerate(rows.split(rows_per_expert.tolist())):
        gate, up = product(x, expert, gate_up, on_gate_up).chunk(2, dim=-1)
        out.append(product(F.silu(gate) * up, expert, down, on_down))
    return torch.cat(out)


def route(
    x: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "experts hidden"], top_k: int, normalise: bool
) -> Routing:
    """Softmax over all experts, then the top k, renormalised to sum to 1 if `normalise`; in float32. The definition.

    The released model computes the logits in its own dtype. float32 avoids the ties that bfloat16 causes around the
    k-th expert, and makes recompute choose the same experts.
    """
    logits = F.linear(x.float(), weight.float())
    probabilities = logits.softmax(-1)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = experts.flatten()
    return Routing(
        experts,
        weights.to(x.dtype),
        # Not bincount, which synchronises with the GPU to find the largest value.
        rows=chosen.new_zeros(logits.shape[-1]).scatter_add_(0, chosen, torch.ones_like(chosen)),
        probability_sum=probabilities.detach().sum(0, dtype=torch.float64),
        z_sum=logits.detach().logsumexp(-1).square().sum(dtype=torch.float64),
        logits=logits,
    )


class Router(nn.Module):
    """The router of one layer; `compute` is `route` or an equivalent kernel."""

    def __init__(self, hidden: int, experts: int, top_k: int, normalise: bool):
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.compute: Route = route

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return self.compute(x, self.weight, self.top_k, self.normalise)


class Experts(nn.Module):
    """Gated MLPs of the local experts, stacked in two tensors.

    `compute` is `experts_in_a_loop` or an equivalent kernel. `adapt` adds low-rank factors named after the two tensors
    (`lora_A.gate_up_proj` and so on); the tensors themselves do not change.
    """

    def __init__(self, hidden: int, width: int, local_experts: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(local_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(local_experts, hidden, width))
        self.compute: ExpertCompute = experts_in_a_loop
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_scale = 0.0
        self.lora_on = True

    def adapt(self, rank: int, scale: float) -> None:
        """Add zero-filled low-rank factors of this rank, in the dtype and on the device of the weights."""
        self.lora_scale = scale
        for name in ("gate_up_proj", "down_proj"):
            weight = self.get_parameter(name)
            experts, outputs, inputs = weight.shape
            self.lora_A[name] = nn.Parameter(weight.new_zeros(experts, rank, inputs))
            self.lora_B[name] = nn.Parameter(weight.new_zeros(experts, outputs, rank))

    def forward(
        self, rows: Float[Tensor, "rows hidden"], rows_per_expert: Int[Tensor, " local_experts"]
    ) -> Float[Tensor, "rows hidden"]:
        return self.compute(rows, rows_per_expert, self.gate_up_proj, self.down_proj, self.factors())

    def factors(self) -> ExpertFactors | None:
        """The active adapters; None without adapters, or while they are switched off."""
        if not self.lora_on or not self.lora_A:
            return None
        a, b, scale = self.lora_A, self.lora_B, self.lora_scale
        return ExpertFactors(
            LowRank(a["gate_up_proj"], b["gate_up_proj"], scale), LowRank(a["down_proj"], b["down_proj"], scale)
        )


class MoE(nn.Module):
    """Routed experts plus one shared expert behind a sigmoid gate.

    If this device holds all experts, `whole` may be a kernel that sorts, computes and combines.
    """

    def __init__(self, config: ModelConfig, local_experts: int):
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(hidden, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        self.experts = Experts(hidden, config.moe_intermediate_size, local_experts)
        self.shared_expert = MLP(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.exchange: Exchange = exchange_locally
        self.whole: LocalCompute | None = None
        self.add_gated: Callable[..., Tensor] = add_gated  # the definition, or an equivalent kernel

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> tuple[Float[Tensor, "tokens hidden"], Routing]:
        routing = self.gate(x)
        if self.whole is not None:
            gate_up, down, factors = self.experts.gate_up_proj, self.experts.down_proj, self.experts.factors()
            return self.whole(x, routing, gate_up, down, factors, self._shared(x)), routing
        arrive = self.exchange(x, routing)
        # The shared expert overlaps with the dispatch of rows; in the backward pass, its gradient overlaps with the
        # transfer of theirs.
        shared = self._shared(x)
        rows, rows_per_expert, restore = arrive()
        return restore(self.experts(rows, rows_per_expert)) + shared, routing

    def _shared(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.add_gated(None, self.shared_expert(x), x, self.shared_expert_gate.weight)
