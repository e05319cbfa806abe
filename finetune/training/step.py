"""One optimizer step: forward and backward passes over the micro-batches, and the update."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed.world import World
from finetune.engine.engine import ExpertEngine
from finetune.model.model import PADDING, HybridMoEForCausalLM, Output
from finetune.recipe.sections import Router
from finetune.training.router_loss import count_ahead, count_rows, router_loss, shares_of_step
from finetune.training.totals import Windows


def optimize(
    engine: ExpertEngine, batches: Sequence[Batch], router: Router, world: World, windows: Windows | None = None
) -> float:
    """Run forward and backward over this rank's micro-batches, then update the parameters. Collective.

    The loss is the sum over supervised tokens, divided by their number over all ranks and micro-batches of the step,
    plus the router losses of the step. Every rank passes the same number of micro-batches, which may be all padding.

    If any micro-batch on any rank has a loss or gradient that is not finite, no rank changes a parameter or a moment.

    Returns:
        Gradient norm over all ranks before clipping; infinite if the step was skipped.
    """
    model: HybridMoEForCausalLM = engine.module
    supervised, tokens = world.sum(token_counts(batches)).unbind()
    over_step = router.balance.coefficient > 0 and router.balance.kind == "global"
    shares = shares_of_step(count_ahead(model, batches), world) if over_step and len(batches) > 1 else None
    broken = torch.zeros((), device=supervised.device)  # number of losses that are not finite
    for place, batch in enumerate(batches):
        output: Output = engine(batch.input_ids, batch.segment_ids, labels=batch.labels)
        rows = count_rows(output.routings)
        if over_step and len(batches) == 1:
            shares = shares_of_step(rows, world)
        assert output.loss_sum is not None, "the batch has labels"
        loss = output.loss_sum / supervised.clamp_min(1) + router_loss(
            output.routings, batch.segment_ids, router, step_shares=shares, step_tokens=tokens
        )
        broken += (~loss.detach().isfinite()).sum()
        if place == len(batches) - 1:
            # The optimizer detects gradients that are not finite, but an infinite loss may have a finite gradient.
            engine.optimizer.loss_is_finite = world.sum(broken) == 0
        # DeepSpeed averages gradients over the ranks; the factor turns the average into the sum.
        engine.backward((loss * world.size).float(), scale_wrt_gas=False)
        engine.step()
        if windows is not None:
            windows.add(output, batch, rows)
    return float(engine.get_global_grad_norm())


def token_counts(batches: Sequence[Batch]) -> Tensor:
    """Number of supervised tokens and of tokens without padding in these micro-batches: (2,) float64, exact."""
    supervised = torch.stack([(batch.labels != -100).sum() for batch in batches]).sum()
    tokens = torch.stack([(batch.segment_ids != PADDING).sum() for batch in batches]).sum()
    return torch.stack((supervised, tokens)).double()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for this step on this rank, so that a resumed run draws the same numbers as an uninterrupted one."""
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of this step on this rank."""
    return zlib.crc32(f"{seed}/{step}/{rank}".encode())
