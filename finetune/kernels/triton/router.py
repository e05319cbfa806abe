"""The router after its matrix product in one pass: softmax, top k, routing weights, and statistics; Triton.

Definition: `finetune.model.moe.route`.
"""

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from finetune.model.moe import Routing

ROWS = 4  # tokens of a program; with one warp, the search for the maximum needs no barrier
BACKWARD_ROWS = 8


def route_fused(
    x: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "experts hidden"], top_k: int, normalise: bool
) -> Routing:
    """Equivalent of `finetune.model.moe.route`; no host synchronisation.

    Products of bfloat16 numbers are exact in float32, in which they are summed, so the logits are as accurate as those
    of the definition, which converts to float32 first. Among equal probabilities the lower expert id is chosen first.
    """
    return Routing(*_Route.apply(x, weight, top_k, normalise))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, top_k, normalise):  # type: ignore[no-untyped-def]
        tokens, experts = len(x), len(weight)
        if x.is_cuda and x.dtype == weight.dtype != torch.float32:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(x.float(), weight.float())
        chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
        shares = x.new_empty(tokens, top_k)
        programs = triton.cdiv(tokens, ROWS)
        counted = torch.empty(programs, experts, dtype=torch.int32, device=x.device)
        probabilities = torch.empty(programs, experts, dtype=torch.float32, device=x.device)
        squares = torch.empty(programs, dtype=torch.float32, device=x.device)
        if tokens:
            _route_kernel[(programs,)](
                logits, chosen, shares, counted, probabilities, squares, tokens, experts,
                **_constants(top_k, normalise, experts), ROWS=ROWS, num_warps=1,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, logits, chosen)
        ctx.top_k, ctx.normalise = top_k, normalise
        counts = counted.sum(0)
        probability_sum, z_sum = probabilities.sum(0, dtype=torch.float64), squares.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(chosen, counts, probability_sum, z_sum)
        ctx.set_materialize_grads(False)
        return chosen, shares, counts, probability_sum, z_sum, logits

    @staticmethod
    def backward(ctx, _c, d_shares, _n, _p, _z, d_logits_given):  # type: ignore[no-untyped-def]
        x, weight, logits, chosen = ctx.saved_tensors
        if d_shares is None and d_logits_given is None:
            return None, None, None, None
        d_logits = torch.empty(logits.shape, dtype=x.dtype, device=x.device)
        if len(x):
            _route_backward_kernel[(triton.cdiv(len(x), BACKWARD_ROWS),)](
                logits, chosen,
                None if d_shares is None else d_shares.contiguous(),
                None if d_logits_given is None else d_logits_given.contiguous(),
                d_logits, len(x), len(weight), **_constants(ctx.top_k, ctx.normalise, len(weight)),
                ROWS=BACKWARD_ROWS, num_warps=4,
            )  # fmt: skip
        d_x = d_logits @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (d_logits.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None, None


def _constants(top_k: int, normalise: bool, experts: int) -> dict[str, int | bool]:
    return {
        "TOP_K": top_k, "TOP_KS": triton.next_power_of_2(top_k), "NORMALISE": normalise,
        "BLOCK": triton.next_power_of_2(experts),
    }  # fmt: skip


@triton.jit
@no_type_check
def _probabilities(logits, row, column, tokens, experts):
    """Softmax of these rows, zero beyond the last expert; and the log-sum-exp of the logits."""
    mask = (row < tokens)[:, None] & (column < experts)[None, :]
    logit = tl.load(logits + row[:, None] * experts + column[None, :], mask=mask, other=float("-inf"))
    logit = tl.where((row < tokens)[:, None], logit, 0.0)  # a row of -inf only would give NaN
    top = tl.max(logit, axis=1)
    exponential = tl.where((column < experts)[None, :], tl.exp(logit - top[:, None]), 0.0)
    total = tl.sum(exponential, axis=1)
    return exponential / total[:, None], top + tl.log(total)


@triton.jit
@no_type_check
def _route_kernel(
    logits, chosen, shares, counted, probabilities, squares, tokens, experts,
    TOP_K: tl.constexpr, TOP_KS: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column, choice = tl.arange(0, BLOCK), tl.arange(0, TOP_KS)
    live = row < tokens
    probability, divisor = _probabilities(logits, row, column, tokens, experts)
    left = tl.where((column < experts)[None, :], probability, -1.0)
    best = tl.zeros((ROWS, TOP_KS), tl.int64)
    share = tl.zeros((ROWS, TOP_KS), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for place in tl.static_range(TOP_K):
        largest, expert = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True)
        hit = column[None, :] == expert[:, None]
        best = tl.where(choice[None, :] == place, expert[:, None].to(tl.int64), best)
        share = tl.where(choice[None, :] == place, largest[:, None], share)
        left = tl.where(hit, -1.0, left)
        count += tl.sum((hit & live[:, None]).to(tl.int32), axis=0)
    if NORMALISE:
        share /= tl.sum(share, axis=1)[:, None]
    mask = live[:, None] & (choice < TOP_K)[None, :]
    place = row[:, None] * TOP_K + choice[None, :]
    tl.store(chosen + place, best, mask=mask)
    tl.store(shares + place, share.to(shares.dtype.element_ty), mask=mask)
    inside = column < experts
    tl.store(counted + program * experts + column, count, mask=inside)
    summed = tl.sum(tl.where(live[:, None], probability, 0.0), axis=0)
    tl.store(probabilities + program * experts + column, summed, mask=inside)
    tl.store(squares + program, tl.sum(tl.where(live, divisor * divisor, 0.0), axis=0))


@triton.jit
@no_type_check
def _route_backward_kernel(
    logits, chosen, d_shares, d_logits_given, d_logits, tokens, experts,
    TOP_K: tl.constexpr, TOP_KS: tl.constexpr, NORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = row < tokens
    mask = live[:, None] & (column < experts)[None, :]
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    if d_shares is not None:
        probability, _ = _probabilities(logits, row, column, tokens, experts)
        is_chosen = tl.zeros((ROWS, BLOCK), tl.float32)
        given = tl.zeros((ROWS, BLOCK), tl.float32)
        for place in tl.static_range(TOP_K):
            expert = tl.load(chosen + row * TOP_K + place, mask=live, other=0)
            hit = (column[None, :] == expert[:, None]).to(tl.float32)
            is_chosen += hit
            given += hit * tl.load(d_shares + row * TOP_K + place, mask=live, other=0.0).to(tl.float32)[:, None]
        if NORMALISE:  # equals a softmax over the chosen experts only
            share = probability * is_chosen
            share /= tl.sum(share, axis=1)[:, None]
            out = share * (given - tl.sum(share * given, axis=1)[:, None])
        else:
            out = probability * (given - tl.sum(probability * given, axis=1)[:, None])
    place = row[:, None] * experts + column[None, :]
    if d_logits_given is not None:
        out += tl.load(d_logits_given + place, mask=mask, other=0.0)
    tl.store(d_logits + place, out.to(d_logits.dtype.element_ty), mask=mask)
