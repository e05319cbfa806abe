"""The recipe of a run, stored in every checkpoint and read from there. Imports no torch.

`RUN/recipe.yaml` is a copy for people. It is read only if no checkpoint holds the recipe: before the first checkpoint,
and in runs of earlier versions.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.manifest import newest_manifest
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import is_hub_id, resolve
from finetune.recipe.recipe import Recipe, RecipeError

FILE = "recipe.yaml"


class RunRecipe(NamedTuple):
    """The recipe of a run, and the file or checkpoint that it was read from."""

    values: dict[str, Any]  # sections as a recipe file has them, defaults included
    source: Path  # a checkpoint or recipe.yaml

    def recipe(self) -> Recipe:
        """Validate the values as a `Recipe`.

        Raises:
            RecipeError: the values are not valid in this version.
        """
        try:
            return Recipe.model_validate(_with_tuples(self.values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RecipeError(
                f"{self.source}: holds the recipe of another version of Nextune"
                f" ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()}); use that version"
            ) from None


def recorded(recipe: Recipe) -> Recipe:
    """The recipe as a run records it: a local model by its absolute path, a hub id unchanged."""
    found = resolve(recipe.model.path)
    if found is None or not found.is_dir():
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(found.absolute())})})


def recipe_state(recipe: Recipe) -> dict[str, Any]:
    """The recipe and its hash, as a checkpoint stores them."""
    values = recorded(recipe).model_dump(mode="json")
    return {"recipe": values, "recipe_sha256": _hash(values)}


def recipe_in(state: Mapping[str, Any], checkpoint: Path) -> RunRecipe | None:
    """The recipe stored in a checkpoint; None in one of an earlier version, which stored no recipe.

    Raises:
        CheckpointError: the recipe does not match its hash.
    """
    if "recipe" not in state:
        return None
    values = state["recipe"]
    if not isinstance(values, dict) or state.get("recipe_sha256") != _hash(values):
        raise CheckpointError(f"{checkpoint}: the recipe in its manifest was changed after it was written")
    return RunRecipe(values, checkpoint)


def run_recipe(run: Path) -> RunRecipe | None:
    """The recipe of the run in a folder, from its newest checkpoint or else from recipe.yaml; None without either.

    Raises:
        RecipeError: recipe.yaml is needed but is not valid, or is missing although there is a checkpoint.
        CheckpointError: see `recipe_in`.
    """
    found = newest_manifest(run / "checkpoints")
    stored = recipe_in(found[1].get("state", {}), found[0]) if found else None
    if stored is not None:
        return stored
    if os.path.exists(run / FILE):
        try:
            recipe = load_recipe(run / FILE, check_paths=False)
        except RecipeError as error:
            raise RecipeError(
                f"{str(error).splitlines()[0]}; this file says what the run in that folder is, so put it back as it"
                " was, or give this run a name of its own (--set name=...)"
            ) from None
        return RunRecipe(recipe.model_dump(mode="json"), run / FILE)
    if found is not None:
        raise RecipeError(
            f"{run / FILE}: no such file, and {found[0]}, written by an earlier version, holds no recipe; put the file"
            " back"
        )
    return None


def changed_keys(now: Mapping[str, Any], before: RunRecipe, free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Settings that define a run and differ, each with its old and new value.

    A local base that no longer exists may have been moved, so its path is not compared; `resume` compares fingerprints.

    Args:
        now: sections of the recipe, as `recorded`.
        free: prefixes of the keys that may change between two starts of one run.
    """
    values = before.values
    with suppress(RecipeError):  # from another version: compared unchanged
        values = recorded(before.recipe()).model_dump(mode="json")  # adds defaults of newer settings
    old, new = flatten(values), flatten(now)
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    moved = old.get("model.path", "")
    if not is_hub_id(str(moved)) and not Path(str(moved)).is_dir():
        changed.pop("model.path", None)
    return {key: pair for key, pair in changed.items() if pair[0] != pair[1] and not key.startswith(free)}


def listed_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Text that names the first three settings that differ."""
    first = [f"{key} was {before!r}, is {now!r}" for key, (before, now) in list(changed.items())[:3]]
    return ", ".join(first) + (", ..." if len(changed) > 3 else "")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def file_note(run: Path, stored: RunRecipe, free: tuple[str, ...]) -> str | None:
    """Note that recipe.yaml is missing, invalid or edited, which has no effect on the run; or None.

    Args:
        free: see `changed_keys`.
    """
    file, instead = run / FILE, f"it changes nothing, because the recipe of {stored.source} counts"
    if file == stored.source:
        return None
    if not os.path.exists(file):
        return f"{file}: is missing; {instead}"
    try:
        values = load_recipe(file, check_paths=False).model_dump(mode="json")
    except RecipeError:
        return f"{file}: is no longer a recipe; {instead}"
    changed = changed_keys(values, stored, free)
    return f"{file}: was edited ({listed_changes(changed)}); {instead}" if changed else None


def _with_tuples(value: Any) -> Any:
    """Convert lists, which JSON makes of tuples, back to tuples."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
