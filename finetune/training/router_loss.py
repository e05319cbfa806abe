"""Router losses of a whole step, and a check that their gradient reaches trainable parameters.

By default load is balanced over the step: the share of rows that each expert received is counted over all ranks and
micro-batches before any backward pass. With one micro-batch per rank this costs one all-reduce of layers x experts
numbers. With more, it also costs a forward pass without gradient over the step's micro-batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.model import PADDING, HybridMoEForCausalLM
from finetune.model.moe import Routing
from finetune.recipe.sections import Router
from finetune.training.losses import load_balance, load_share, router_z


class RouterLossError(ValueError):
    """A router loss of the recipe has no gradient for any trainable parameter."""


def reads_logits(router: Router) -> bool:
    """Whether a router loss is in use and router logits must be stored."""
    return router.balance.coefficient > 0 or router.z_coefficient > 0


def router_loss(
    routings: Mapping[int, Routing],
    segment_ids: Tensor,
    router: Router,
    *,
    step_shares: Tensor | None,
    step_tokens: Tensor,
) -> Tensor:
    """One micro-batch's part of the router losses of the step, weighted by the recipe's coefficients.

    Summed over layers; the parts of all ranks and micro-batches add up to the loss of the step.

    Args:
        segment_ids: (packs, tokens) of the micro-batch; documents are the groups of `sequence` balancing.
        step_shares: (layers, experts) shares counted over the step, for `global` balancing.
        step_tokens: tokens of the whole step without padding, all ranks and micro-batches.
    """
    total = torch.zeros((), device=segment_ids.device)
    if not reads_logits(router):
        return total
    group, groups = _groups(segment_ids, router.balance.kind, tokens=len(next(iter(routings.values())).experts))
    for place, routing in enumerate(routings.values()):
        assert routing.logits is not None, "a router loss is in use, but the model kept no router logits"
        if router.balance.coefficient > 0:
            if router.balance.kind == "global":
                assert step_shares is not None, "global balancing needs shares counted over the step"
                share = step_shares[place : place + 1]
            else:
                share = load_share(routing.experts, group, groups, routing.logits.shape[-1])
            total = total + router.balance.coefficient * load_balance(routing.logits, share, group, step_tokens)
        if router.z_coefficient > 0:
            total = total + router.z_coefficient * router_z(routing.logits, step_tokens)
    return total


def count_rows(routings: Mapping[int, Routing]) -> Tensor:
    """Rows that each expert received from this batch: (layers, experts) int64."""
    return torch.stack([routing.rows for routing in routings.values()])


def shares_of_step(counts: Tensor, world: World) -> Tensor:
    """Share of the step's rows that each expert received, summed over all ranks' counts. Communicates."""
    total = world.sum(counts.double())
    return (total / total.sum(-1, keepdim=True).clamp_min(1)).float()


@torch.no_grad()
def count_ahead(model: HybridMoEForCausalLM, batches: Sequence[Batch]) -> Tensor:
    """Count rows per expert over all of this rank's micro-batches in an additional forward pass.

    The random state is restored, so that dropout is the same in the differentiated pass.
    """
    device = batches[0].input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        counts = [count_rows(model.route(batch.input_ids, batch.segment_ids)) for batch in batches]
    return torch.stack(counts).sum(0)


def prove_reach(model: HybridMoEForCausalLM, batch: Batch, router: Router, world: World) -> dict[str, float]:
    """Compute the gradient norm of each router loss in use over the trainable parameters, on one batch. Collective.

    Returns:
        Norm by name of the coefficient.

    Raises:
        RouterLossError: the norm is zero or not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    norms = {}
    for name, coefficient, balance, z in (
        ("router.balance.coefficient", router.balance.coefficient, router.balance.coefficient, 0.0),
        ("router.z_coefficient", router.z_coefficient, 0.0, router.z_coefficient),
    ):
        if coefficient == 0:
            continue
        routings = model.route(batch.input_ids, batch.segment_ids)
        tokens = world.sum((batch.segment_ids != PADDING).sum().double())
        alone = router.model_copy(
            update={"balance": router.balance.model_copy(update={"coefficient": balance}), "z_coefficient": z}
        )
        shares = shares_of_step(count_rows(routings), world)
        loss = router_loss(routings, batch.segment_ids, alone, step_shares=shares, step_tokens=tokens)
        squares = torch.zeros((), dtype=torch.float64, device=tokens.device)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
            squares = sum((g.double().square().sum() for g in gradients if g is not None), squares)
        norms[name] = float(world.sum(squares).sqrt())
        if not 0 < norms[name] < float("inf"):
            raise RouterLossError(
                f"{name} is {coefficient:g}, but its loss gives a gradient of {norms[name]:g} to everything that"
                " trains; train the router (router.train: true) or set the coefficient to 0"
            )
    return norms


def _groups(segment_ids: Tensor, kind: str, *, tokens: int) -> tuple[Tensor, int]:
    """Group index of every token that is not padding, and the number of groups.

    `sequence` (one group per document) synchronises with the device; the other kinds do not.
    """
    flat = segment_ids.flatten()
    if kind != "sequence":
        return torch.zeros(tokens, dtype=torch.long, device=flat.device), 1
    pack = torch.arange(segment_ids.shape[0], device=flat.device).repeat_interleave(segment_ids.shape[1])
    _, group = torch.unique(torch.stack((pack, flat))[:, flat != PADDING], dim=1, return_inverse=True)
    return group, int(group.max()) + 1 if group.numel() else 1
