"""`export`: write a checkpoint of a run as a folder that other tools load."""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.checkpoint.adapter import export_adapter
from finetune.checkpoint.adapter_limits import adapter_limits
from finetune.checkpoint.fingerprint import is_of
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.manifest import hash_of_values, read_manifest
from finetune.checkpoint.mark import About, check_own, read_mark
from finetune.checkpoint.merged import export_merged
from finetune.checkpoint.resume import chosen_checkpoint, open_state
from finetune.checkpoint.trained import LoraFactors, split_trained
from finetune.checkpoint.weights import resolve_model
from finetune.commands.model_card import Exported, model_card, versions
from finetune.model.config import ModelConfig
from finetune.recipe.paths import is_hub_id, resolve
from finetune.run.folder import FREE, finished_step
from finetune.run.stored_recipe import RunRecipe, file_note, recipe_in, run_recipe

COMMAND = "python -m finetune export"  # default `written_by` of an export


class Base(NamedTuple):
    """The base of a run at its current place."""

    folder: Path
    name: str  # for users of an adapter: a hub id, or an absolute path


def export_run(
    run: str | Path,
    to: str | Path,
    *,
    kind: str,
    which: str = "newest",
    base: str | Path | None = None,
    writer: str = COMMAND,
) -> int:
    """Export a checkpoint of a run as a merged model or as an adapter.

    Args:
        kind: merged or adapter.
        which: newest, best or step-N.
        base: folder of the base weights; by default the one in the checkpoint's recipe.
        writer: name of the caller, stored in the mark. Any writer but the command may replace its own exports, and
            touches no other folder.

    Raises:
        CheckpointError: no such whole checkpoint, or the trained tensors do not match the base or the format.
        RecipeError: `run` is not a run folder.
    """
    run, to = Path(run), Path(to)
    if os.path.realpath(run / "checkpoints") in map(str, Path(os.path.realpath(to)).parents):
        raise CheckpointError(f"{to}: lies among the checkpoints of the run; choose another folder")
    checkpoint = chosen_checkpoint(run / "checkpoints", which, print, finished_step(run))
    state, tensors = open_state(checkpoint)
    sha256 = hash_of_values(read_manifest(checkpoint))
    if writer != COMMAND and not _is_due(to, sha256, writer, f"{COMMAND} {run} --to DIR --format {kind}"):
        return 0
    stored = _recipe(run, state, checkpoint)
    found = _base(stored, state, checkpoint, Path(base) if base is not None else None)
    adapter, replaced = _split(stored.values["lora"], state, tensors, checkpoint)
    exported = Exported(kind, run.absolute(), found.name, found.folder, state, stored.values)
    about = About(model_card(exported), _facts(exported, checkpoint, sha256, writer))
    print(f"exporting {checkpoint} on {found.folder} as {kind} to {to}", flush=True)
    if kind == "adapter":
        for sentence in _limits(stored.values):
            print(f"note: {sentence}")
        written = export_adapter(
            found.folder, to, adapter=adapter, replaced=replaced, base_name=found.name, about=about
        )
        print(f"{to}: {written.sentence()}")
        return 0
    merged = export_merged(
        found.folder,
        to,
        adapter=adapter,
        replaced=replaced,
        from_base=stored.values["model"]["init"] == "pretrained",
        about=about,
        check_replaceable=None if writer == COMMAND else functools.partial(check_own, writer=writer),
    )
    print(f"{to}: {merged.sentence()}")
    return 0


def _is_due(to: Path, sha256: str, writer: str, command: str) -> bool:
    """Whether an automatic export should be written; prints why not."""
    if not to.exists():
        return True
    try:
        check_own(to, writer)
    except CheckpointError as error:
        print(f"note: {error}; to export this run, name a folder of your own: {command}", flush=True)
        return False
    mark = read_mark(to) or {}
    if mark.get("checkpoint_sha256") == sha256:
        print(f"{to}: holds this checkpoint already", flush=True)
    return mark.get("checkpoint_sha256") != sha256


def _recipe(run: Path, state: Mapping[str, Any], checkpoint: Path) -> RunRecipe:
    stored = recipe_in(state, checkpoint)
    if stored is None:  # written by an earlier version
        stored = run_recipe(run)
        if stored is None:
            raise CheckpointError(f"{checkpoint}: holds no recipe, and {run} no recipe.yaml; put the file back")
        print(f"note: {checkpoint}: holds no recipe, written by an earlier version; it is read from {stored.source}")
    elif note := file_note(run, stored, FREE):
        print(f"note: {note}")
    return stored


def _base(stored: RunRecipe, state: Mapping[str, Any], checkpoint: Path, given: Path | None) -> Base:
    path = stored.values["model"]["path"]
    if given is not None and not given.is_dir():
        raise CheckpointError(f"--base: {given}: no such folder; give that of the base weights")
    try:
        folder = given or resolve_model(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the path is model.path in {stored.source}; if the base is elsewhere now, add --base DIR"
        ) from None
    ModelConfig.from_folder(folder)
    if not is_of(state["base"], folder):
        raise CheckpointError(
            f"{checkpoint}: was trained on other base weights than {folder} holds now; put those back to export it, or"
            " name their folder with --base DIR"
        )
    is_local = given is not None or resolve(path) is not None
    return Base(folder, path if is_hub_id(path) and (given is not None or not is_local) else str(folder.absolute()))


def _split(
    lora: Mapping[str, Any] | None, state: Mapping[str, Any], tensors: Mapping[str, Any], checkpoint: Path
) -> tuple[LoraFactors | None, Mapping[str, Any]]:
    lora = lora or {}
    adapter, replaced = split_trained(
        tensors,
        alpha=lora.get("alpha", 0.0),
        dropout=lora.get("dropout", 0.0),
        rslora=lora.get("use_rslora", False),
    )
    trained = state.get("adapter")  # None in checkpoints of an earlier version
    if adapter is None or trained is None:
        return adapter, replaced
    if trained["rank"] != adapter.rank or not math.isclose(trained["scaling"], adapter.scaling):
        raise CheckpointError(
            f"{checkpoint}: was trained with rank {trained['rank']} and scale {trained['scaling']:g}, but its recipe"
            f" and factors say rank {adapter.rank} and scale {adapter.scaling:g}; export another checkpoint"
        )
    return adapter, replaced


def _limits(values: Mapping[str, Any]) -> list[str]:
    lora = values["lora"]
    return adapter_limits(lora["targets"], trains_routers=values["router"]["train"]) if lora else []


def _facts(exported: Exported, checkpoint: Path, sha256: str, writer: str) -> dict[str, Any]:
    return {
        "written_by": writer,
        "format": exported.kind,
        "run": str(exported.run),
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256,
        "step": exported.state["step"],
        "base": exported.base_name,
        "base_fingerprint": exported.state["base"],
        "recipe_sha256": exported.state.get("recipe_sha256"),
        "versions": versions(),
    }
