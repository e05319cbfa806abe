"""The folder of a run: its recipe, its lock, and the markers that it finished or stopped."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune.recipe.load import dump
from finetune.recipe.paths import expanded
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.place import check_place, hold, marked_step
from finetune.run.stored_recipe import FILE, changed_keys, file_note, listed_changes, recorded, run_recipe
from monitoring.files import replace_file
from monitoring.json_file import FileError, read_object

# Settings that may change between two starts of one run: duration, reporting, saving and parallel layout; and learning
# rate and router losses, which a finding may advise to change. Any other change would make it another run.
FREE = (
    *("train.steps", "train.epochs", "train.log_every_steps", "train.eval_every_steps", "train.recompute"),
    *("train.micro_batch_tokens", "train.on_nan", "train.early_stopping_", "lora.init_from"),
    *("checkpoint.", "monitor.", "parallel.", "kernels.", "data.cache", "output."),
    *("optim.lr", "optim.clip_norm", "router.balance.", "router.z_coefficient"),
)


def folder_of(recipe: Recipe) -> Path:
    """Absolute path of the run's folder."""
    return expanded(recipe.output.dir).absolute() / recipe.name


def recipe_of(run: str | Path) -> Recipe:
    """The effective recipe of the run in a folder, from its newest checkpoint or, before the first, recipe.yaml.

    Raises:
        RecipeError: the folder holds no recipe.
    """
    found = run_recipe(Path(run))
    if found is None:
        raise RecipeError(f"{run}: not the folder of a run (it holds no {FILE})")
    return found.recipe()


def run_of_step(kept: str | Path) -> Path:
    """The run folder of a stored step, RUN/crash/step-N."""
    kept = Path(kept)
    return kept.absolute().parent.parent


def check_folder(folder: Path, recipe: Recipe) -> list[str]:
    """Check that the folder is writable, and that an earlier run in it had the same recipe. Changes nothing.

    Returns:
        Notes for the user: the run's recipe.yaml is missing or was edited.

    Raises:
        RecipeError: it is not writable, or holds a run of another recipe; names the keys that differ.
    """
    check_place(folder)
    before = run_recipe(folder)
    if before is None:
        return []
    changed = changed_keys(recorded(recipe).model_dump(mode="json"), before, FREE)
    if changed:
        raise RecipeError(
            f"{folder}: holds a run of another recipe ({listed_changes(changed)});"
            f" give this one a name of its own (--set name=...) or delete the folder"
        )
    note = file_note(folder, before, FREE)
    return [note] if note else []


def claim(folder: Path, recipe: Recipe) -> FileLock:
    """Create the folder, write the effective recipe into it, and return the lock that reserves it for this process.

    Raises:
        RecipeError: the folder cannot be written, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = hold(folder)
        (folder / "stopped.json").unlink(missing_ok=True)
        replace_file(folder / FILE, dump(recorded(recipe)).encode())
    except OSError as error:
        raise RecipeError(f"output.dir: {folder} cannot be written ({error.strerror or error})") from None
    return held


def finished_step(folder: str | Path) -> int | None:
    """The last step of a run that finished, or None. Under a launcher the exit code is not reliable."""
    folder = Path(folder)
    return marked_step(folder / "finished.json")


def lost_checkpoint(folder: Path) -> str | None:
    """Describe the problem if the last checkpoint of a finished run is missing or incomplete; else None.

    Compares sizes of files only. A newer checkpoint, from a continued run, also counts.
    """
    step, root = finished_step(folder), folder / "checkpoints"
    if step is None or any(_step_of(path) >= step and _has_its_files(path) for path in root.glob("step-*")):
        return None
    lost = root / f"step-{step}"
    return (
        f"{folder}: ended at step {step}, but its checkpoint of that step is gone or incomplete ({lost});"
        " the training command makes it again from an older one, if there is one"
    )


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _has_its_files(checkpoint: Path) -> bool:
    try:
        parts = read_object(checkpoint / "manifest.json")["parts"]
        return all((checkpoint / part["file"]).stat().st_size == part["bytes"] for part in parts)
    except (FileError, OSError, KeyError, TypeError):
        return False


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in this folder finished all steps or epochs of this recipe and has its last checkpoint."""
    step, asked = finished_step(folder), recipe.checkpoint.resume_from
    goes_back = asked is not None and is_own_checkpoint(asked) and asked != done_resume_from(folder)
    if step is None or goes_back or lost_checkpoint(folder):
        return False
    facts = read_object(folder / "finished.json")
    if facts.get("stopped_early") is not None:
        return bool(facts["stopped_early"] == early_stopping_of(recipe))
    return facts.get("epochs", 0) >= recipe.train.epochs if recipe.train.epochs else step >= recipe.train.steps


def early_stopping_of(recipe: Recipe) -> dict[str, float]:
    """Settings of early stopping. A run that stopped early is complete only for the same settings."""
    return {"patience": recipe.train.early_stopping_patience, "threshold": recipe.train.early_stopping_threshold}


def is_own_checkpoint(asked: str) -> bool:
    """Whether this value of `checkpoint.resume_from` names a checkpoint of the run itself."""
    return re.fullmatch(r"step-\d+|best", asked) is not None


def done_resume_from(folder: Path) -> str | None:
    """The `checkpoint.resume_from` that this run has already rewound to, or None."""
    marker = folder / "resumed-from.json"
    return str(read_object(marker).get("resume_from")) if marker.exists() else None


def mark_resume_from(folder: Path, asked: str | None) -> None:
    """Record that the run rewound to this checkpoint of its own; None removes the record."""
    marker = folder / "resumed-from.json"
    if asked is None:
        marker.unlink(missing_ok=True)
    else:
        replace_file(marker, json.dumps({"resume_from": asked}).encode())


def mark_finished(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the marker that the run finished, with its final facts."""
    replace_file(folder / "finished.json", json.dumps(dict(facts), indent=1).encode())


def stopped_step(folder: str | Path) -> int | None:
    """The step after which the run stopped gracefully and can resume, or None."""
    folder = Path(folder)
    return marked_step(folder / "stopped.json")


def mark_stopped(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the marker that the run saved and stopped on request; the next start removes it."""
    replace_file(folder / "stopped.json", json.dumps(dict(facts), indent=1).encode())
