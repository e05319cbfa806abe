"""The training loop: the order of steps, reports, evaluations and checkpoints."""

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

SECONDS_FOR_THE_ONE_BEFORE = 2  # a due save waits this long for the previous checkpoint before it is postponed


class TrainingError(ValueError):
    """The run must end. The message says what happened, at which step, and where the run can resume."""


class Run:
    """One run on this rank, from its assembly to its end."""

    def __init__(self, recipe: Recipe, folder: Path, base: Path, base_now: str, world: World, say: Say, watch: Watch):
        """Build the run and resume from its newest checkpoint, if there is one. Collective.

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
        set_timeouts()  # of the process groups that the engine created
        with world.together(RecipeError):  # last, so that an earlier error leaves no folder
            self.claimed = claim(folder, recipe) if world.is_main else None
        self.engine, self.model, self.loader = parts.engine, parts.model, parts.loader
        self.evaluation, self.data = parts.evaluation, parts.data
        self.reports = Reports(self.recipe, world, self.model, parts.probe)
        self.health = Health(router_trains=self.recipe.router.train)
        self.best: dict[str, float] | None = None  # step and loss of the lowest held-out loss so far
        self.early_stopping = EarlyStopping()
        self.from_another_run = False  # then held-out loss is measured before the first step
        self.left_out = LeftOut()
        self.put_off = False  # a save is due but the previous checkpoint is still being written
        self.best_unsaved = False  # the lowest held-out loss has no checkpoint yet
        self.step = self._resume(say)
        self.saving = Saving(folder / "checkpoints", world, keep=recipe.checkpoint.keep, progress=watch.beat)
        self.journal = Journal(self.recipe, folder, world, self.health, 0 if self.from_another_run else self.step)

    def train(self) -> None:
        """Train to the last step, with reports, evaluations and checkpoints. Collective."""
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
            is_best = self._evaluate() and recipe.checkpoint.keep_best
            if self.step and is_best:  # the other run keeps its checkpoint for itself
                with self.reports.clock.stopped():
                    self._save_when_free(now=False, is_best=True)
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
                self.reports.windows.sums.copy_(sums)  # a skipped step counts nothing, and its sums are not finite
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
        self.journal.close()  # before the marker: a complete run never restarts to send W&B the rest
        if self.world.is_main:
            mark_finished(self.folder, facts)
        self.world.barrier()

    def _leave_out(self, batches: Sequence[Batch]) -> None:
        """Report a skipped step whose loss or gradient is not finite, or end the run. Collective.

        Raises:
            TrainingError: `train.on_nan` is `stop`, or too many steps in a row were skipped; the batch is stored.
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
        except CheckpointError as error:  # on rank 0, whose message is the one reported
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
        """What is needed to repeat the step, beside its batch."""
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
        """Wait for an unfinished checkpoint, then name the one that this run can resume from. Collective."""
        broken = ""
        try:
            self._record_saved(self.saving.settle())
        except RankError as error:  # on all ranks; it must not hide why the run ends
            broken = f"{error}; "
        kept = newest_name(self.folder / "checkpoints")
        return broken + (f"the newest checkpoint is {kept}" if kept else "there is no checkpoint yet")

    def _asked_to_stop(self) -> str | None:
        """Why this run must stop gracefully now, if any rank received such a request. All-reduces two numbers.

        Raises:
            RankError: a rank failed to write its part of the checkpoint.
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
        """Measure the held-out loss, if there is held-out data; return whether it is the lowest so far. Collective."""
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
        """Save if a checkpoint is due or was postponed, unless the previous one is still being written. Collective.

        A due save blocks training up to `SECONDS_FOR_THE_ONE_BEFORE` for the previous checkpoint, so that a short write
        does not move it to another step. It is then postponed, and later steps check again without waiting.

        Args:
            now: the run is about to stop, so wait without limit; this also applies after the last step.
            is_best: the held-out loss is the lowest so far and needs a checkpoint.

        Raises:
            RankError: the previous checkpoint could not be written.
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
        """Start to write a checkpoint, which a run on any number of ranks can resume from. Collective.

        Training is blocked while tensors are copied to host memory.

        Args:
            began: `time.perf_counter()` when training stopped for it.
        """
        self._record_saved(self.saving.done())
        if self.best and self.best_unsaved and self.best["step"] != self.step:  # postponed since the evaluation
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
        """Write the record of a complete checkpoint."""
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
        """Restore the state from the checkpoint that this run starts from; return its step, or 0. Collective."""
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
        if self.world.is_main:  # they are sums over all ranks, so the other ranks start from zero
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
        """End the run on every rank if a health rule on rank 0 requires it. All-reduces one number.

        Raises:
            TrainingError: says what the rule found, and where the run can resume.
        """
        told = self.world.sum(torch.tensor(float(len(self.journal.reasons_to_stop)), device=self.world.device))
        if not told:
            return
        everyone = cast(list[list[str]], self.world.gather(self.journal.reasons_to_stop))
        reasons = next(reasons for reasons in everyone if reasons)
        raise TrainingError(f"step {self.step}: stopped: {'; '.join(reasons)}; {self._newest()}")
