"""Mixture of experts: the router, the expert weights, and the block that joins them.

Single-device mathematics. Where a row of work is done is decided by `MoE.exchange`, a function that sets rows off for
their experts and hands out its own inverse; `parallel/experts.py` provides the one that crosses ranks.

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
    """What the router decided for the tokens of a batch, padding left out."""

    experts: Int[Tensor, "tokens top_k"]  # chosen expert ids, most probable first
    weights: Float[Tensor, "tokens top_k"]  # share of each chosen expert in the output
    rows: Int[Tensor, " experts"]  # how many tokens chose each expert
    probability_sum: Float[Tensor, " experts"]  # float64, router probabilities summed over the tokens, no gradient
    z_sum: Float[Tensor, ""]  # float64, squared log-sum-exp of the logits summed over the tokens, no gradient
    # float32, before softmax, read by the router losses; None where none is in use, to save the memory
    logits: Float[Tensor, "tokens experts"] | None


class Dispatched(NamedTuple):
    """Token rows laid out for the experts of this device, and the way back."""

    rows: Float[Tensor, "rows hidden"]  # sorted by local expert
    rows_per_expert: Int[Tensor, " local_experts"]
    restore: Callable[[Tensor], Tensor]  # (rows, hidden) -> (tokens, hidden), weighted and summed over top_k


class LowRank(NamedTuple):
    """Factors that adapt one matrix of every local expert: W_e stands for W_e + scale * B_e A_e."""

    a: Float[Tensor, "local_experts rank inputs"]
    b: Float[Tensor, "local_experts outputs rank"]
    scale: float


class ExpertFactors(NamedTuple):
    """What adapts the local experts."""

    gate_up: LowRank
    down: LowRank


# Sets rows off for their experts; what it returns waits until those for this device have arrived.
Exchange = Callable[[Tensor, Routing], Callable[[], Dispatched]]
# Rows sorted by expert, rows per expert, the two stacked weights and their factors -> the experts' outputs.
ExpertCompute = Callable[[Tensor, Tensor, Tensor, Tensor, ExpertFactors | None], Tensor]
# Tokens, their routing, the two stacked weights, their factors, and what is added to the experts' weighted sum.
LocalCompute = Callable[[Tensor, Routing, Tensor, Tensor, ExpertFactors | None, Tensor], Tensor]
# Tokens, the router's weight, top k, whether the shares are normalised.
Route = Callable[[Tensor, Tensor, int, bool], Routing]


def exchange_locally(x: Float[Tensor, "tokens hidden"], routing: Routing) -> Callable[[], Dispatched]:
    """Every expert is on this device: sort rows by expert, and undo the sort."""
    order = sort_by_expert(routing.experts)
    arrived = Dispatched(
        rows_of(x, order, routing.experts.shape[1]), routing.rows, lambda rows: combine(rows, order, routing.weights)
    )
    return lambda: arrived


def sort_by_expert(experts: Int[Tensor, "tokens top_k"]) -> Int[Tensor, " rows"]:
    """Order of the flattened (token, choice) slots by expert."""
    return experts.flatten().argsort(stable=True)


def rows_of(x: Float[Tensor, "tokens hidden"], order: Int[Tensor, " rows"], top_k: int) -> Float[Tensor, "rows hidden"]:
    """A row for every slot, in this order of the slots."""
    return _Rows.apply(x, order, inverse(order), top_k)


def permuted(rows: Float[Tensor, "rows hidden"], order: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
    """Rows in this order."""
    return _Permuted.apply(rows, order, inverse(order))


def put_back(rows: Float[Tensor, "rows hidden"], order: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
    """What `permuted` undoes."""
    return _Permuted.apply(rows, inverse(order), order)


def inverse(order: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Where each row of this order came to lie."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Permuted(torch.autograd.Function):
    """rows[there]. As `index` it would add up a gradient that has nothing to add up, one number after the other."""

    @staticmethod
    def forward(ctx, rows, there, back):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        return rows[there]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient[ctx.saved_tensors[0]], None, None


class _Rows(torch.autograd.Function):
    """x[order // top_k], whose gradient is a sum over each token's rows, always in the same order."""

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
    """Put sorted rows back in their slots and take each token's weighted sum."""
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

    Every expert is touched, rows or none, so that every rank builds the same graph. One host synchronisation.

    Args:
        factors: of the adapted experts, whose products W_e x become W_e x + scale * B_e (A_e x).
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
    """Softmax over all experts, then the top k, renormalised to sum to 1 where the model says so; in float32.

    The released model computes the logits in its own dtype; float32 avoids the ties that bfloat16 makes at the edge of
    the top k, and makes recompute choose the same experts.
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
        # Not bincount, which waits for a GPU to learn the largest value.
        rows=chosen.new_zeros(logits.shape[-1]).scatter_add_(0, chosen, torch.ones_like(chosen)),
        probability_sum=probabilities.detach().sum(0, dtype=torch.float64),
        z_sum=logits.detach().logsumexp(-1).square().sum(dtype=torch.float64),
        logits=logits,
    )


class Router(nn.Module):
    """The weights that choose experts; `compute` is the definition or a kernel equal to it."""

    def __init__(self, hidden: int, experts: int, top_k: int, normalise: bool):
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.compute: Route = route

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return self.compute(x, self.weight, self.top_k, self.normalise)


class Experts(nn.Module):
    """Gated MLPs of the local experts, stacked in two tensors; `compute` is the definition or a kernel equal to it.

    `adapt` adds low-rank factors under the names of the two tensors, `lora_A.gate_up_proj` and so on; the tensors
    themselves stay as they are.
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
        """Add factors of this rank, all zero, in the dtype and on the device of the weights."""
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
        """What adapts the experts now; None without adapters, or while they are switched off."""
        if not self.lora_on or not self.lora_A:
            return None
        a, b, scale = self.lora_A, self.lora_B, self.lora_scale
        return ExpertFactors(
            LowRank(a["gate_up_proj"], b["gate_up_proj"], scale), LowRank(a["down_proj"], b["down_proj"], scale)
        )


class MoE(nn.Module):
    """Routed experts plus one shared expert behind a sigmoid gate.

    Where all experts are on this device, `whole` may be a kernel that sorts, computes and combines in one.
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
        self.add_gated: Callable[..., Tensor] = add_gated  # the definition, or a kernel equal to it

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> tuple[Float[Tensor, "tokens hidden"], Routing]:
        routing = self.gate(x)
        if self.whole is not None:
            gate_up, down, factors = self.experts.gate_up_proj, self.experts.down_proj, self.experts.factors()
            return self.whole(x, routing, gate_up, down, factors, self._shared(x)), routing
        arrive = self.exchange(x, routing)
        # While rows travel; autograd goes back in the opposite order, so that in the backward pass too this is computed
        # while their gradients do.
        shared = self._shared(x)
        rows, rows_per_expert, restore = arrive()
        return restore(self.experts(rows, rows_per_expert)) + shared, routing

    def _shared(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.add_gated(None, self.shared_expert(x), x, self.shared_expert_gate.weight)
