"""Checkpoints of a run over all ranks: started together, written in the background, resumed from."""

import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data.loader import Loader
from data.sources import DataError
from finetune.checkpoint.fingerprint import is_of
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import TensorStore, check_nothing_lost, open_state
from finetune.checkpoint.shards import listed
from finetune.checkpoint.writer import Writer, Written
from finetune.distributed.world import World
from finetune.engine import engine as engines
from finetune.engine.engine import ExpertEngine
from finetune.recipe.paths import resolve
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.recipe.sections import Lora
from finetune.run.folder import FREE
from finetune.run.starting_point import StartingPoint, starting_point
from finetune.run.stored_recipe import changed_keys, listed_changes, recipe_in, recorded
from finetune.training.adapter_folder import adapter_values
from finetune.training.assembly import Say
from finetune.training.lora import AdapterError
from monitoring.files import MonitoringError

SECONDS_BETWEEN_LOOKS = 0.1  # polling interval while ranks write


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, and the time it took."""

    written: Written
    blocked_seconds: float  # training was blocked: waiting for the previous checkpoint, copying to host memory


class Saving:
    """Saves the state of a run, one checkpoint at a time. The caller must check `failed` over all ranks every step."""

    def __init__(self, root: Path, world: World, *, keep: int, progress: Callable[[], None] = lambda: None):
        """Agree on a token for the names of temporary folders. Collective.

        Args:
            root: folder of the checkpoints.
            keep: number of checkpoints to keep.
            progress: called by the writing thread after each piece that is written.
        """
        token = cast(str, world.gather(secrets.token_hex(4))[0])
        self._world = world
        self._writer = Writer(root, rank=world.rank, ranks=world.size, token=token, keep=keep, progress=progress)
        self._blocked_seconds = 0.0

    @property
    def failed(self) -> bool:
        """Whether this rank failed to write its part of the latest checkpoint."""
        return self._writer.failed

    def begin(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any], *, began: float, spare: list[int]
    ) -> None:
        """Start to write a state in host memory, and return immediately. Every rank calls it, when `is_free` is true.

        Args:
            tensors: the tensors that this rank stores.
            state: everything that is not a tensor; rank 0's is stored.
            began: `time.perf_counter()` when training stopped for this checkpoint.
            spare: steps whose checkpoints must not be deleted.
        """
        self._writer.begin(step, tensors, state, spare=spare)
        self._blocked_seconds = time.perf_counter() - began

    def done(self) -> Saved | None:
        """Return the latest checkpoint once, when it is complete; only on rank 0. Does not communicate."""
        if self._writer.failed:
            return None
        written = self._writer.finish()
        return Saved(written, self._blocked_seconds) if written else None

    def settle(self) -> Saved | None:
        """Wait until the latest checkpoint is complete, and return it on rank 0. Communicates.

        Raises:
            RankError: it could not be written; on all ranks, with the message of the rank that failed.
        """
        self.is_free(math.inf)
        return self.done()

    def is_free(self, seconds: float) -> bool:
        """Whether no rank is writing, after waiting for that up to about `seconds`. Communicates.

        Raises:
            RankError: the checkpoint could not be written; on all ranks, with the message of the rank that failed.
        """
        looks = seconds / SECONDS_BETWEEN_LOOKS  # a count, because clocks of the ranks may disagree
        while True:
            state = torch.tensor([self._writer.busy, self._writer.failed], dtype=torch.float32)
            busy, failed = self._world.sum(state.to(self._world.device)).tolist()
            if failed:
                self.tell_failure()
            if not busy or looks <= 0:
                return not busy
            looks -= 1
            self._writer.wait(SECONDS_BETWEEN_LOOKS)

    def tell_failure(self) -> None:
        """End the run on all ranks because some rank failed to write its part. Collective.

        Raises:
            RankError: the message of the rank that failed.
        """
        try:
            with self._world.together(CheckpointError):
                self._writer.finish()
        finally:  # a rank that kept waiting would not react to its launcher, which ends all ranks
            self._writer.abandon()

    def close(self) -> None:
        """End an unfinished write within seconds. Does not depend on other ranks."""
        self._writer.close()


def resume(
    folder: Path,
    recipe: Recipe,
    engine: ExpertEngine,
    loader: Loader,
    world: World,
    *,
    base: Path,
    base_now: str,
    say: Say,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], TensorStore] | None:
    """Restore engine and loader from the checkpoint that the run starts from. Collective.

    Args:
        folder: of the run.
        recipe: of this start. Settings that define a run must equal those in the checkpoint, if it is of this run.
        base: folder of the base weights, `base_now` their fingerprint.
        progress: called after each hashed piece and for each tensor that is read.

    Returns:
        State and tensors of the checkpoint; None if the run starts from the base weights.

    Raises:
        RankError: recipe, base weights or data differ; checkpoints exist but none is complete; the disk cannot be read.
    """
    with world.together(CheckpointError, RecipeError, MonitoringError):
        found = starting_point(folder, recipe, progress) if world.is_main else None
    start = cast(StartingPoint, world.gather(found)[0])
    for sentence in start.said:
        say(sentence)
    if start.checkpoint is None:
        with world.together(CheckpointError, MonitoringError):
            if world.is_main:
                check_nothing_lost(folder / "checkpoints")
        if recipe.lora is not None and recipe.lora.init_from is not None:
            _start_from_adapter(recipe.lora, recipe.lora.init_from, engine, world, say)
        return None
    with world.together(CheckpointError, DataError):
        state, tensors = open_state(start.checkpoint)
        if not start.of_another_run:
            _check_recipe(recipe, state, start.checkpoint)
        if not is_of(state["base"], base, base_now):
            raise CheckpointError(
                f"{start.checkpoint}: belongs to other base weights than {recipe.model.path} holds now; put them back,"
                " or start a new run under another name"
            )
        loader.restore(state["loader"])
        if start.of_another_run:
            _check_steps_left(start.checkpoint, state["step"], recipe.train.steps)
            _check_same_parameters(start.checkpoint, tensors, engine)
            state |= {"best": None, "wandb": None, "early_stopping": None, "of_another_run": True}

    def read(name: str) -> Tensor:
        progress()
        return tensors.read(name)

    engines.restore(engine, read, step=state["step"] - state["left_out"]["total"])
    say(f"continuing after step {state['step']} from {start.checkpoint}")
    return state, tensors


def _check_steps_left(checkpoint: Path, step: int, last: int) -> None:
    """Refuse another run's checkpoint if this run would end where it stands."""
    if step >= last:
        raise CheckpointError(
            f"{checkpoint}: stands at step {step}, and this run ends at step {last}, so nothing is left to train; raise"
            " train.steps or train.epochs"
        )


def _check_same_parameters(checkpoint: Path, tensors: TensorStore, engine: ExpertEngine) -> None:
    """Refuse another run's checkpoint if it holds parameters that do not train here. Reading refuses missing ones."""
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    others = sorted({name.split("::")[0] for name in tensors if "::" in name} - trained)
    if others:
        raise CheckpointError(
            f"{checkpoint}: holds {listed(others)}, which do not train here; use the recipe of the run it comes from"
        )


def _check_recipe(recipe: Recipe, state: Mapping[str, Any], folder: Path) -> None:
    stored = recipe_in(state, folder)  # None from an earlier version; recipe.yaml was compared before the start
    changed = changed_keys(recorded(recipe).model_dump(mode="json"), stored, FREE) if stored else {}
    if changed:
        raise CheckpointError(
            f"{folder}: belongs to a run of another recipe ({listed_changes(changed)}); undo the change, or start a new"
            " run under another name"
        )


def _start_from_adapter(lora: Lora, init_from: str, engine: ExpertEngine, world: World, say: Say) -> None:
    folder = resolve(init_from) or Path(init_from)
    shapes = {
        name: parameter.shape
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and ".lora_" in name
    }
    with world.together(AdapterError, CheckpointError):
        values = adapter_values(folder, lora, shapes, engine.module.local_experts)
    engines.set_values(engine, values)
    say(f"adapters start from {folder}: {len(values)} tensors on this rank, each used")
