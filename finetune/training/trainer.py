"""The training run: the only file that knows the order of steps, reports, evaluations and checkpoints."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from data.packing import Batch
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import newest_name
from finetune.distributed.world import RankError, World, set_timeouts
from finetune.engine import engine as engines
from finetune.engine.optimizer import learning_rate
from finetune.recipe.recipe import Recipe, RecipeError
from finetune.run.folder import claim, early_stopping_of, mark_finished, mark_stopped
from finetune.run.stored_recipe import recipe_state
from finetune.run.watchdog import Watch
from finetune.training.assembly import Say, assemble
from finetune.training.early_stopping import EarlyStopping
from finetune.training.epochs import with_steps
from finetune.training.evaluation import held_out, to_device
from finetune.training.journal import Journal
from finetune.training.lora import adapter_scale
from finetune.training.nonfinite import MOST_IN_A_ROW, LeftOut, broken_weights, keep_batch, losses_of_packs, origin
from finetune.training.reports import Reports, is_due
from finetune.training.saving import Saved, Saving, resume
from finetune.training.step import optimize, seed_step, step_seed
from monitoring.health import Finding, Health
from monitoring.run_id import keep_run_id, known_run_id

SECONDS_FOR_THE_ONE_BEFORE = 2  # for which a step waits, once, so that its own checkpoint need not be put off


class TrainingError(ValueError):
    """A run that must not go on: says what happened, at which step, and from where it can be continued."""


class Run:
    """One run on this rank, from its assembly to its end; `train` is the order of events."""

    def __init__(self, recipe: Recipe, folder: Path, base: Path, base_now: str, world: World, say: Say, watch: Watch):
        """Put the run together, and go on from its newest checkpoint. Collective.

        Args:
            base: folder of the base weights.
            base_now: their fingerprint.
        """
        self.recipe, self.folder, self.world = recipe, folder, world
        self.base, self.base_folder, self.watch = base_now, base, watch
        parts = assemble(recipe, base, world, say, watch.beat)
        self.recipe, sentences = with_steps(recipe, parts.train_packs)
        for sentence in sentences:
            say(sentence)
        set_timeouts()  # of the groups that the engine made
        with world.together(RecipeError):  # only now: a mistake found before leaves no folder behind
            self.claimed = claim(folder, recipe) if world.is_main else None
        self.engine, self.model, self.loader = parts.engine, parts.model, parts.loader
        self.evaluation, self.data = parts.evaluation, parts.data
        self.reports = Reports(self.recipe, world, self.model, parts.probe)
        self.health = Health()
        self.best: dict[str, float] | None = None  # step and loss of the lowest held-out loss so far
        self.early_stopping = EarlyStopping()
        self.from_another_run = False  # its first held-out loss is measured here
        self.left_out = LeftOut()
        self.put_off = False  # a save that was due while the one before was still being written
        self.best_unsaved = False  # the lowest held-out loss has no checkpoint yet
        self.step = self._resume(say)
        self.saving = Saving(folder / "checkpoints", world, keep=recipe.checkpoint.keep, progress=watch.beat)
        self.journal = Journal(self.recipe, folder, world, self.health, 0 if self.from_another_run else self.step)

    def train(self) -> None:
        """Train to the last step, reporting, evaluating and saving on the way. Collective."""
        try:
            self._train()
        finally:
            self.saving.close()
            self.journal.close()

    def _train(self) -> None:
        recipe, world = self.recipe, self.world
        self.journal.write({"kind": "start", "step": self.step, "ranks": world.size, "expert": world.expert_size})
        self.reports.clock.start()
        if self.step == 0 or self.from_another_run:
            self._evaluate()
        early = self.early_stopping.reason(recipe.train)
        while self.step < recipe.train.steps and early is None:
            self.step += 1
            self.watch.beat()
            lr = learning_rate(self.step, steps=recipe.train.steps, optim=recipe.optim)
            seed_step(recipe.train.seed, self.step, self.world.rank)
            batches = [to_device(batch, self.world.device) for batch in self.loader.next_step()]
            engines.set_learning_rate(self.engine, lr)
            sums = self.reports.windows.sums.clone()
            norm = optimize(self.engine, batches, recipe.router, self.world, self.reports.windows)
            if math.isfinite(norm):
                self.reports.grad_norm, self.left_out.in_a_row = norm, 0
            else:
                self.reports.windows.sums.copy_(sums)  # nothing was learnt from this step, and its sums are not finite
                self._leave_out(batches)
            if self.reports.write(self.journal, self.step, lr):
                self._stop_if_told()
            evaluate = is_due(self.step, recipe.train.eval_every_steps, recipe.train.steps)
            is_best = evaluate and self._evaluate() and recipe.checkpoint.keep_best
            early, stopping = self.early_stopping.reason(recipe.train), self._asked_to_stop()
            with self.reports.clock.stopped():
                self._save_when_free(now=(stopping or early) is not None, is_best=is_best)
            if stopping and not early and self.step < recipe.train.steps:
                self._record_saved(self.saving.settle())
                self.journal.write(
                    {"kind": "action", "step": self.step, "message": f"{stopping}: saved and stopped, resumable"}
                )
                if self.world.is_main:
                    mark_stopped(self.folder, {"step": self.step, "reason": stopping})
                self.world.barrier()
                return
        self._record_saved(self.saving.settle())
        facts: dict[str, Any] = {"step": self.step, "epochs": recipe.train.epochs}
        if early is not None and self.step < recipe.train.steps:
            self.journal.write({"kind": "action", "step": self.step, "message": early})
            facts |= {"reason": early, "stopped_early": early_stopping_of(recipe)}
        self.journal.write({"kind": "end", "step": self.step})
        self.journal.close()  # a complete run is not started again, which would find what a kill kept from W&B
        if self.world.is_main:
            mark_finished(self.folder, facts)
        self.world.barrier()

    def _leave_out(self, batches: Sequence[Batch]) -> None:
        """Say that this step, whose loss or gradient is not finite, changed nothing, or end the run. Collective.

        Raises:
            TrainingError: the recipe says so, or too many came in a row; where the batch is kept.
        """
        left_out, packs = self.left_out, torch.from_numpy(self.loader.packs)
        left_out.total += 1
        left_out.in_a_row += 1
        losses = losses_of_packs(self.model, batches, self.world)
        weights = broken_weights(self.model, self.world)
        why = origin(losses, packs) if weights is None else weights
        found = f"step {self.step}: the loss or the gradient is not finite: {why}"
        stopping = self.recipe.train.on_nan == "stop" or left_out.in_a_row == MOST_IN_A_ROW
        message = found if stopping else f"{found}; the step is skipped, and changed nothing that trains"
        self.journal.write(Finding(self.step, "stop" if stopping else "warn", "not_finite", None, message).record())
        if not stopping:
            return
        newest = self._newest()
        kept = self.folder / "crash" / f"step-{self.step}"
        where = f"its batch is in {kept}"
        try:
            keep_batch(kept, batches, packs, losses, self._facts_of_step(), self.world)
        except CheckpointError as error:  # rank 0, whose sentence is the one that is told
            where = f"its batch could not be kept: {error}"
        advice = (
            "set train.on_nan: skip to pass over such a step"
            if self.recipe.train.on_nan == "stop"
            else f"{MOST_IN_A_ROW} steps in a row are no accident of the data; lower optim.lr, or look at the weights"
        )
        if weights is not None:
            advice = "the batch and optim.lr are not the reason; check the memory of the device"
        raise TrainingError(f"{found}; {where}; {newest}; the same command comes to this step again; {advice}")

    def _facts_of_step(self) -> dict[str, Any]:
        """What a step is taken with beside its batch."""
        train = self.recipe.train
        return {
            "step": self.step,
            "lr": learning_rate(self.step, steps=train.steps, optim=self.recipe.optim),
            "seed": train.seed,
            "seeds": [step_seed(train.seed, self.step, rank) for rank in range(self.world.size)],
            "ranks": self.world.size,
            "expert": self.world.expert_size,
            "loader": self.loader.state(),
            "base": self.base,
        }

    def _newest(self) -> str:
        """Let what is being written become whole, then say from where this run can go on. Collective."""
        broken = ""
        try:
            self._record_saved(self.saving.settle())
        except RankError as error:  # on all ranks; it must not hide why the run ends
            broken = f"{error}; "
        kept = newest_name(self.folder / "checkpoints")
        return broken + (f"the newest checkpoint is {kept}" if kept else "there is no checkpoint yet")

    def _asked_to_stop(self) -> str | None:
        """Why this run is to end in order now, if any rank has been told so. Two numbers are communicated.

        Raises:
            RankError: the checkpoint that was being written came to nothing.
        """
        state = torch.tensor([self.watch.asked_to_stop is not None, self.saving.failed], dtype=torch.float32)
        asked, failed = self.world.sum(state.to(self.world.device)).tolist()
        if failed:
            self.saving.tell_failure()
        self._record_saved(self.saving.done())
        if not asked:
            return None
        return cast(str, next(reason for reason in self.world.gather(self.watch.asked_to_stop) if reason))

    def _evaluate(self) -> bool:
        """Measure the loss on the held-out rows, if there are any; whether it is the lowest so far. Collective."""
        if not self.evaluation:
            return False
        with self.reports.clock.stopped():
            result = held_out(self.model, self.evaluation, self.world)
        record = {"kind": "eval", "step": self.step, **asdict(result)}
        if not math.isfinite(result.loss):
            record["broken_weights"] = broken_weights(self.model, self.world)
        self.journal.write(record)
        self._stop_if_told()
        self.early_stopping.see(result.loss, self.recipe.train)
        is_best = result.loss < (self.best["loss"] if self.best else math.inf)
        if is_best:
            self.best = {"step": self.step, "loss": result.loss}
        return is_best

    def _save_when_free(self, *, now: bool, is_best: bool) -> None:
        """Save if that is due, or was and had to be put off because the one before is still being written. Collective.

        Training stands still for the one before at most `SECONDS_FOR_THE_ONE_BEFORE`, once, so that a write of a moment
        shifts no checkpoint to another step; one of minutes goes on beside the steps that follow.

        Args:
            now: the run is about to stop, so wait for as long as it takes; it does so after the last step too.
            is_best: the held-out loss is the lowest so far, and a checkpoint is to keep it.

        Raises:
            RankError: the one before could not be written.
        """
        self.best_unsaved |= is_best
        due = is_due(self.step, self.recipe.checkpoint.every_steps, self.recipe.train.steps)
        if not (due or now or is_best or self.put_off):
            return
        began = time.perf_counter()
        if now or self.step == self.recipe.train.steps:
            patience = math.inf
        else:
            patience = 0 if self.put_off else SECONDS_FOR_THE_ONE_BEFORE
        self.put_off = not self.saving.is_free(patience)
        if not self.put_off:
            self._save(began)

    def _save(self, began: float) -> None:
        """Begin to write a checkpoint that a run on any number of ranks can go on from. Collective.

        Training stands still while its tensors are copied to host memory.

        Args:
            began: `time.perf_counter()` when it began to stand still.
        """
        self._record_saved(self.saving.done())
        if self.best and self.best_unsaved and self.best["step"] != self.step:  # put off since it was measured
            self.best |= {"step": self.step, "measured": self.best["step"]}
        self.best_unsaved = False
        tensors = engines.training_state(self.engine, self.world)
        windows = self.world.sum(self.reports.windows.sums.clone()).cpu()
        if self.world.is_main:
            tensors["windows"] = windows
        state = {
            **recipe_state(self.recipe),
            "adapter": adapter_scale(self.model),
            "data": self.data,
            "base": self.base,
            "loader": self.loader.state(),
            "best": self.best,
            "left_out": asdict(self.left_out),
            "early_stopping": asdict(self.early_stopping),
            "health": self.health.state(),
            "report": self.reports.state(),
            "wandb": known_run_id(self.folder) if self.world.is_main and self.recipe.monitor.wandb != "off" else None,
        }
        keep_best = self.recipe.checkpoint.keep_best and self.best
        spare = [int(self.best["step"])] if keep_best and self.best else []
        self.saving.begin(self.step, tensors, state, began=began, spare=spare)

    def _record_saved(self, saved: Saved | None) -> None:
        """Write the line of a checkpoint that has become whole."""
        if saved and (why := saved.written.not_deleted):
            message = f"an older checkpoint could not be deleted ({why}); see that the disk does not fill"
            self.journal.write({"kind": "action", "step": saved.written.step, "message": message})
        if saved:
            self.journal.write(
                {
                    "kind": "checkpoint",
                    "step": saved.written.step,
                    "path": str(saved.written.folder.relative_to(self.folder)),
                    "seconds": saved.written.seconds,
                    "blocked_seconds": saved.blocked_seconds,
                }
            )

    def _resume(self, say: Say) -> int:
        """Go on from the newest whole checkpoint of this run, if there is one; return the steps taken. Collective."""
        found = resume(
            self.folder,
            self.recipe,
            self.engine,
            self.loader,
            self.world,
            base=self.base_folder,
            base_now=self.base,
            say=say,
            progress=self.watch.beat,
        )
        if found is None:
            return 0
        state, tensors = found
        if self.world.is_main:  # the sums of all ranks since the last reports; the other ranks start from zero
            self.reports.windows.sums.copy_(tensors.read("windows"))
        self.reports.restore(state.get("report"))
        self.best, self.left_out = state["best"], LeftOut(**state["left_out"])
        self.early_stopping = EarlyStopping(**(state.get("early_stopping") or {}))
        self.from_another_run = bool(state.get("of_another_run"))
        self.health.restore(state["health"])
        if self.world.is_main and state["wandb"]:
            keep_run_id(self.folder, state["wandb"])
        return int(state["step"])

    def _stop_if_told(self) -> None:
        """End the run on every rank when a rule on rank 0 said so. One number is communicated.

        Raises:
            TrainingError: what was found, and from where the run can be continued.
        """
        told = self.world.sum(torch.tensor(float(len(self.journal.reasons_to_stop)), device=self.world.device))
        if not told:
            return
        everyone = cast(list[list[str]], self.world.gather(self.journal.reasons_to_stop))
        reasons = next(reasons for reasons in everyone if reasons)
        raise TrainingError(f"step {self.step}: stopped: {'; '.join(reasons)}; {self._newest()}")
