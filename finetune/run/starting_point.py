"""Selects where a run starts: its newest checkpoint, an earlier one, one of another run, or the base weights."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoint.folder import sync
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.manifest import MANIFEST, STEP, step_of
from finetune.checkpoint.resume import chosen_checkpoint, newest_checkpoint
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe
from finetune.run.folder import done_resume_from, is_own_checkpoint, mark_resume_from, recipe_of
from finetune.run.stored_recipe import flatten
from monitoring.metrics import MetricsFile

# Settings that must be equal for another run's state to be valid in this one.
_MUST_AGREE = ("lora.rank", "lora.alpha", "lora.use_rslora", "lora.targets", "router.train", "optim.name")


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that training resumes from, None for the base weights, and sentences for the user."""

    checkpoint: Path | None
    said: list[str]
    of_another_run: bool = False


def starting_point(folder: Path, recipe: Recipe, progress: Callable[[], None] = lambda: None) -> StartingPoint:
    """Select the checkpoint that the recipe names, or the newest of the run in `folder`, which must be locked.

    The run rewinds to a step of its own only once: the next start with the same `checkpoint.resume_from` resumes from
    the newest checkpoint, so that a run that is killed and restarted loses nothing.

    Args:
        progress: called after each hashed piece.

    Raises:
        CheckpointError: there is no such checkpoint, it is incomplete, or the other run had incompatible settings.
    """
    asked, said = recipe.checkpoint.resume_from, list[str]()
    if asked is not None and is_own_checkpoint(asked) and done_resume_from(folder) != asked:
        chosen = rewind(folder, asked, said.append, progress)
        mark_resume_from(folder, asked)
        return StartingPoint(chosen, said)
    if asked is None:
        mark_resume_from(folder, None)
    newest, said = newest_checkpoint(folder / "checkpoints", progress)
    if newest is not None or asked is None or is_own_checkpoint(asked):
        return StartingPoint(newest, said)
    chosen = _of_another_run(asked, recipe, said.append, progress)
    return StartingPoint(chosen, [*said, f"starting from {chosen} of another run"], of_another_run=True)


def check_resume_from(folder: Path, recipe: Recipe) -> None:
    """Check that the target of `checkpoint.resume_from` exists, before anything is loaded. Changes nothing.

    Raises:
        CheckpointError: it does not exist.
    """
    asked, root = recipe.checkpoint.resume_from, folder / "checkpoints"
    has_own = root.is_dir() and any(STEP.fullmatch(path.name) for path in root.iterdir())
    if asked is None or asked == done_resume_from(folder) or (has_own and not is_own_checkpoint(asked)):
        return
    if not is_own_checkpoint(asked):
        _run_and_checkpoint(asked)
    elif not has_own or (asked != "best" and not (root / asked).is_dir()):
        there = ", ".join(sorted(path.name for path in root.iterdir())) if has_own else "none"
        raise CheckpointError(f"checkpoint.resume_from: {root / asked}: no such checkpoint; there are {there}")


def rewind(
    folder: str | Path, to: str, say: Callable[[str], None], progress: Callable[[], None] = lambda: None
) -> Path:
    """Rewind the run in `folder`, which must be locked, to its checkpoint `to` (step-N or best).

    Nothing is deleted. Later checkpoints and the markers of the run's end move to `set-aside/`. Lines of later steps
    move from metrics.jsonl to metrics.superseded.jsonl.

    Raises:
        CheckpointError: there is no such checkpoint, or it is incomplete.
    """
    folder = Path(folder)
    root = folder / "checkpoints"
    if not root.is_dir():
        raise CheckpointError(f"{folder}: holds no checkpoint to go back to")
    chosen = chosen_checkpoint(root, to, say, progress=progress)
    later = sorted(
        (path for path in root.iterdir() if STEP.fullmatch(path.name) and step_of(path) > step_of(chosen)),
        key=step_of,
        reverse=True,
    )
    marks = [path for path in (folder / "finished.json", folder / "stopped.json") if path.exists()]
    if later or marks:
        aside = _free_place(folder / "set-aside")
        aside.mkdir(parents=True)
        for path in (*marks, *later):
            os.replace(path, aside / path.name)
        sync(root)
        sync(aside)
        names = ", ".join(path.name for path in reversed(later)) or "the mark of the run's end"
        say(f"{folder}: went back to {chosen.name}; {names} set aside in {aside}")
    metrics = MetricsFile(folder / "metrics.jsonl", step_of(chosen))
    metrics.write({"kind": "start", "step": step_of(chosen), "went_back": True})
    metrics.close()
    return chosen


def _free_place(parent: Path) -> Path:
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)


def _run_and_checkpoint(asked: str) -> tuple[Path, str]:
    """Resolve a path to the folder of another run and the name of one of its checkpoints, or `newest`."""
    path = resolve(asked)
    if path is None:
        raise CheckpointError(
            f"checkpoint.resume_from: {asked}: no such folder; give step-N or best of this run, or the folder of"
            " another run or of one of its checkpoints"
        )
    run, which = (path.parent.parent, path.name) if (path / MANIFEST).exists() else (path, "newest")
    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"checkpoint.resume_from: {asked}: neither the folder of a run nor of a run's checkpoint")
    return run, which


def _of_another_run(asked: str, recipe: Recipe, say: Callable[[str], None], progress: Callable[[], None]) -> Path:
    """The checkpoint at this path, or the newest one of the run at this path."""
    run, which = _run_and_checkpoint(asked)
    chosen = chosen_checkpoint(run / "checkpoints", which, say, progress=progress)
    theirs = flatten(recipe_of(run).model_dump(mode="json"))
    ours = flatten(recipe.model_dump(mode="json"))
    for key in _MUST_AGREE:
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"checkpoint.resume_from: {run} was trained with {key} {json.dumps(theirs.get(key))}, this recipe says"
                f" {json.dumps(ours.get(key))}; make them equal"
            )
    return chosen
