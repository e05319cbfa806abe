"""One optimizer step: what is differentiated, over which tokens, on which ranks."""

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
    """Forward and backward over this rank's micro-batches, then the update over all ranks; return the gradient's norm.

    The loss is the sum over supervised tokens divided by their number in the whole step, all ranks and micro-batches,
    plus the router losses of the step. The norm is over all ranks, before clipping. Collective: every rank calls it
    with as many micro-batches, which may hold nothing but padding.

    A loss or gradient that is not finite, of any micro-batch on any rank, changes no parameter and no moment on any
    rank; the norm is then infinite.
    """
    model: HybridMoEForCausalLM = engine.module
    supervised, tokens = world.sum(token_counts(batches)).unbind()
    over_step = router.balance.coefficient > 0 and router.balance.kind == "global"
    shares = shares_of_step(count_ahead(model, batches), world) if over_step and len(batches) > 1 else None
    broken = torch.zeros((), device=supervised.device)  # losses that are not finite
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
            # The optimizer skips a step whose gradient is not finite; a loss may be infinite where its gradient is not.
            engine.optimizer.loss_is_finite = world.sum(broken) == 0
        # DeepSpeed averages gradients over the ranks; times their number it is the sum that was divided above.
        engine.backward((loss * world.size).float(), scale_wrt_gas=False)
        engine.step()
        if windows is not None:
            windows.add(output, batch, rows)
    return float(engine.get_global_grad_norm())


def token_counts(batches: Sequence[Batch]) -> Tensor:
    """Supervised tokens, and tokens without padding, in these micro-batches; float64, which counts them exactly."""
    supervised = torch.stack([(batch.labels != -100).sum() for batch in batches]).sum()
    tokens = torch.stack([(batch.segment_ids != PADDING).sum() for batch in batches]).sum()
    return torch.stack((supervised, tokens)).double()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator for this step on this rank, so that a resumed run draws what an undisturbed one would."""
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, rank: int) -> int:
    """What the generators of this rank start from in this step."""
    return zlib.crc32(f"{seed}/{step}/{rank}".encode())
