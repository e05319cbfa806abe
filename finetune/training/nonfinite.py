"""Diagnosis of a step whose loss or gradient is not finite, and storage of its batch.

`optimize` skips such a step on every rank and changes no parameter. `crash/step-N/` stores what is needed to repeat it.
`batches.safetensors` holds `input_ids`, `labels` and `segment_ids` (micro-batches, ranks, packs, tokens), and without
the last axis `packs` (indices of packs in the training data) and `loss_sums` (of each pack, without dropout).
`step.json` holds step number, learning rate, seeds and layout. `python -m finetune replay` repeats the forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data.packing import Batch
from finetune.checkpoint.finite import all_finite, described
from finetune.checkpoint.folder import save_tensors, whole_folder, write_json
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import listed
from finetune.distributed.world import World
from finetune.model.model import HybridMoEForCausalLM

MOST_IN_A_ROW = 5  # skipped steps; more are unlikely to be caused by single bad rows of the data
MOST_NAMED = 3
BATCH, FACTS = "batches.safetensors", "step.json"  # files of a stored step


@dataclass
class LeftOut:
    """Skipped steps of the whole run, which the optimizer does not count, and those in a row up to now."""

    total: int = 0
    in_a_row: int = 0


@torch.no_grad()
def losses_of_packs(model: HybridMoEForCausalLM, batches: Sequence[Batch], world: World) -> Tensor:
    """Compute the summed loss of every pack, without dropout, in one forward pass per pack. Collective.

    Returns:
        (micro-batches, ranks, packs) float64 on the host; every rank has the same number of packs.
    """
    was_training = model.training
    model.eval()
    shape = (len(batches), world.size, batches[0].input_ids.shape[0])
    losses = torch.zeros(shape, dtype=torch.float64, device=world.device)
    for place, batch in enumerate(batches):
        for pack in range(shape[-1]):
            one = Batch(*(tensor[pack : pack + 1] for tensor in batch))
            output = model(one.input_ids, one.segment_ids, labels=one.labels)
            losses[place, world.rank, pack] = output.loss_sum
    model.train(was_training)
    return world.sum(losses).cpu()


def origin(losses: Tensor, packs: Tensor) -> str:
    """Name the packs whose loss is not finite.

    Args:
        losses: (micro-batches, ranks, packs).
        packs: their indices in the training data, in the same shape.
    """
    places = (~losses.isfinite()).nonzero().tolist()
    if not places:
        return "the loss of each of its sequences alone is finite, so the gradient is not"
    named = [
        f"sequence {int(packs[place, rank, pack])} of the training data (rank {rank}, micro-batch {place})"
        for place, rank, pack in places[:MOST_NAMED]
    ]
    more = f" and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
    return f"the loss is not finite on {', '.join(named)}{more}, of {losses.numel()}"


@torch.no_grad()
def broken_weights(model: HybridMoEForCausalLM, world: World) -> str | None:
    """Name the parameters that hold infinite or undefined numbers on any rank; None if all are finite. Collective.

    The base weights were finite when they were loaded, which is checked.
    """
    mine = [f"{name} ({described(p)})" for name, p in model.named_parameters() if not all_finite(p.detach())]
    everyone = cast(list[list[str]], world.gather(mine))
    found = [f"{name} on rank {rank}" for rank, names in enumerate(everyone) for name in names]
    if not found:
        return None
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return (
        f"{len(found)} weights hold infinite or undefined numbers, which they did not when they were loaded:"
        f" {', '.join(found[:MOST_NAMED])}{more}"
    )


def _check_own(folder: Path) -> None:
    other = sorted({path.name for path in folder.iterdir()} - {BATCH, FACTS}) if folder.is_dir() else [folder.name]
    if other:
        raise CheckpointError(f"{folder}: holds {listed(other)}, which is not of a kept step, and stays as it is")


def keep_batch(
    folder: Path, batches: Sequence[Batch], packs: Tensor, losses: Tensor, facts: Mapping[str, Any], world: World
) -> None:
    """Write the batch of all ranks into `folder`, atomically, in place of an earlier one.

    Communicates: rank 0 gathers the micro-batches and writes them. Must not be called inside `World.together`.

    Raises:
        CheckpointError: writing failed; on rank 0 only.
    """
    mine = {name: torch.stack([getattr(batch, name) for batch in batches]).cpu() for name in Batch._fields}
    everyone: list[Any] = world.gather(mine)
    if not world.is_main:
        return
    tensors = {name: torch.stack([of_rank[name] for of_rank in everyone], dim=1) for name in Batch._fields}
    with whole_folder(folder, check_replaceable=_check_own) as partial:
        save_tensors({**tensors, "packs": packs.contiguous(), "loss_sums": losses.contiguous()}, partial / BATCH)
        write_json(partial / FACTS, dict(facts))
