"""Replay of a step that was not finite: its batch, stored in `crash/step-N/`, is forwarded through a folder's weights.

Runs on the CPU without training, so only data and weights can be the cause. To replay it with a run's trained weights,
export its checkpoint as a merged model and pass that folder.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.checkpoint.fingerprint import is_of
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.shards import Checkpoint, read_header
from finetune.checkpoint.weights import from_pretrained, resolve_model
from finetune.model.model import HybridMoEForCausalLM
from finetune.run.folder import recipe_of, run_of_step
from finetune.training.assembly import dtype_of
from monitoring.json_file import FileError, read_object

BATCH = ("input_ids", "labels", "segment_ids")


def replay(kept: str | Path, folder: str | Path | None) -> int:
    """Print the loss of every sequence of a stored step, then and now.

    Args:
        kept: `RUN/crash/step-N`.
        folder: folder of the weights; by default the base of the run.

    Returns:
        0 if the same sequences are not finite as in the run, else 1.

    Raises:
        CheckpointError: the step or the weights cannot be read, or the base has changed since that step.
        RecipeError: `kept` is not in a run folder.
    """
    kept = Path(kept)
    folder = Path(folder) if folder is not None else None
    recipe = recipe_of(run_of_step(kept))
    tensors, facts = read_step(kept)
    if folder is None:
        folder = resolve_model(recipe.model.path)
        if not is_of(facts["base"], folder):
            raise CheckpointError(
                f"{kept}: was taken on other base weights than {folder} holds now; put those back, or name a folder"
                " with --model"
            )
    print(f"step {facts['step']} of {recipe.name} on the weights in {folder}", flush=True)
    device = torch.device("cpu")
    losses = losses_of_step(from_pretrained(folder, dtype=dtype_of(recipe, device), device=device), tensors)
    for (place, rank, pack), number in zip(_places(tensors["packs"]), tensors["packs"].flatten().tolist(), strict=True):
        before, now = tensors["loss_sums"][place, rank, pack], losses[place, rank, pack]
        print(f"sequence {number} (rank {rank}, micro-batch {place}): the loss summed to {before:.6g}, now {now:.6g}")
    same = torch.equal(losses.isfinite(), tensors["loss_sums"].isfinite())
    print("not finite in the same sequences" if same and not losses.isfinite().all() else _verdict(same))
    return 0 if same else 1


def _verdict(same: bool) -> str:
    if same:
        return "finite in all sequences, now as then: it was the gradient"
    return "not the same as then: it depends on what the run had learnt; export its checkpoint and name it with --model"


def read_step(kept: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and facts written by `keep_batch`.

    Raises:
        CheckpointError: they are missing or cannot be read.
    """
    path = kept / "batches.safetensors"
    try:
        stored, facts = Checkpoint(kept, read_header(path)), read_object(kept / "step.json")
        tensors = {name: stored.read(name) for name in stored.tensors}
    except (FileError, CheckpointError) as error:
        raise CheckpointError(f"{kept}: holds no batch of a step that can be read ({error})") from None
    if not _fits(tensors) or not isinstance(facts.get("base"), str) or not isinstance(facts.get("step"), int):
        raise CheckpointError(f"{kept}: holds no batch of a step: its tensors or step.json are not those of one")
    return tensors, facts


def _fits(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of a batch: (micro-batches, ranks, packs, tokens), and one number for each pack."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    batch = shapes.get("input_ids", ())
    of_tokens = all(shapes.get(name) == batch for name in BATCH)
    return len(batch) == 4 and of_tokens and all(shapes.get(name) == batch[:3] for name in ("packs", "loss_sums"))


@torch.no_grad()
def losses_of_step(model: HybridMoEForCausalLM, tensors: dict[str, Tensor]) -> Tensor:
    """Summed loss of every pack, forwarded alone without dropout: (micro-batches, ranks, packs), float64."""
    model.eval()
    losses = torch.zeros(tensors["packs"].shape, dtype=torch.float64)
    for at in _places(tensors["packs"]):
        ids, labels, segments = (tensors[name][at][None] for name in BATCH)
        losses[at] = model(ids, segments, labels=labels).loss_sum
    return losses


def _places(packs: Tensor) -> list[tuple[int, int, int]]:
    return [(int(a), int(b), int(c)) for a, b, c in torch.ones_like(packs).nonzero()]
