"""The training run: the only file that knows the order of steps, reports, evaluations and checkpoints."""

import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from data.sources import DataError
from finetune import engine as engines
from finetune.assembly import Say, assemble
from finetune.checkpoint.folder import fingerprint
from finetune.checkpoint.layout import CheckpointError
from finetune.checkpoint.resume import newest_checkpoint, open_state, write_checkpoint
from finetune.evaluation import ProbedRouting, compare_routing, held_out, probe_routing, to_device
from finetune.optim import learning_rate
from finetune.parallel.world import World, was_launched
from finetune.recipe import Recipe, RecipeError
from finetune.run_folder import claim, mark_finished
from finetune.step import optimize, seed_step
from finetune.watch import STALL_SECONDS, Watch
from finetune.window import Totals, Windows
from monitoring.files import MonitoringError
from monitoring.health import Health
from monitoring.metrics import read_metrics
from monitoring.routing import LayerDrift, RoutingSnapshot, routing_drift, routing_measures
from monitoring.sinks import Sinks, open_sinks


class TrainingError(ValueError):
    """A run that must not go on: says what happened, at which step, and from where it can be continued."""


class Run:
    """One run on this rank, from its assembly to its end; `train` is the order of events."""

    def __init__(self, recipe: Recipe, folder: Path, base: Path, world: World, say: Say):
        self.recipe, self.folder, self.world = recipe, folder, world
        self.base = fingerprint(base)
        self.watch = Watch(folder, world.rank, STALL_SECONDS)
        self.reasons_to_stop: list[str] = []
        parts = assemble(recipe, base, world, say)
        with world.together(RecipeError):  # only now: a mistake found before leaves no folder behind
            self.claimed = claim(folder, recipe) if world.is_main else None
        self.engine, self.model, self.loader = parts.engine, parts.model, parts.loader
        self.evaluation, self.probe = parts.evaluation, parts.probe
        self.layers = self.model.settings.moe_layers
        self.windows = Windows(len(self.layers), self.model.settings.num_experts, world.device)
        # Taken before any trained state is put in: what the base model's routers do with the probe tokens.
        self.base_routing = self._probe_routing() if recipe.monitor.drift_every_steps else None
        self.step = self._resume(say)
        self.health = Health()
        self.sinks = self._open_sinks(say)
        self.report_started = time.perf_counter()
        self.grad_norm = 0.0

    def train(self) -> None:
        """Train to the last step, reporting, evaluating and saving on the way. Collective."""
        self.watch.begin(launched=was_launched())
        try:
            self._train()
        finally:
            self.watch.end()
            self.sinks.close()

    def _train(self) -> None:
        recipe = self.recipe
        self._record({"kind": "start", "step": self.step, "ranks": self.world.size, "expert": self.world.expert_size})
        if self.step == 0:
            self._evaluate()
        while self.step < recipe.train.steps:
            self.step += 1
            self.watch.beat()
            lr = learning_rate(self.step, steps=recipe.train.steps, optim=recipe.optim)
            seed_step(recipe.train.seed, self.step, self.world.rank)
            batches = [to_device(batch, self.world.device) for batch in self.loader.next_step()]
            engines.set_learning_rate(self.engine, lr)
            self.grad_norm = optimize(self.engine, batches, recipe.router, self.world, self.windows)
            self._report(lr)
            if self._due(recipe.train.eval_every_steps):
                self._evaluate()
            stopping = self._asked_to_stop()
            if stopping or self._due(recipe.checkpoint.every_steps):
                self._save()
            if stopping and self.step < recipe.train.steps:
                self._record(
                    {"kind": "action", "step": self.step, "message": f"{stopping}: saved and stopped, resumable"}
                )
                return
        self._record({"kind": "end", "step": self.step})
        if self.world.is_main:
            mark_finished(self.folder, {"step": self.step})
        self.world.barrier()

    def _asked_to_stop(self) -> str | None:
        """Why this run is to end in order now, if any rank has been told so. One number is communicated."""
        asked = torch.tensor(float(self.watch.asked_to_stop is not None), device=self.world.device)
        if not self.world.sum(asked):
            return None
        return cast(str, next(reason for reason in self.world.gather(self.watch.asked_to_stop) if reason))

    def _due(self, every: int) -> bool:
        """Whether something done every so many steps is due now; after the last step everything is, once."""
        return self.step == self.recipe.train.steps or (every > 0 and self.step % every == 0)

    def _report(self, lr: float) -> None:
        """Write what is due of the training line and the routing record. Communicates when something is."""
        monitor = self.recipe.monitor
        # A gradient that is not finite is seen by all ranks, and reported before a checkpoint could keep what it did.
        broken = not math.isfinite(self.grad_norm)
        report = broken or self.step == 1 or self._due(self.recipe.train.log_every_steps)
        drift = monitor.drift_every_steps > 0 and self._due(monitor.drift_every_steps)
        routing = drift or (monitor.routing_every_steps > 0 and self._due(monitor.routing_every_steps))
        if not report and not routing:
            return
        since_report, since_routing = self.windows.close(self.world, report=report, routing=routing)
        line = self._training_line(since_report, lr)
        # Routing first: the training line on the console names the worst layer of this window, not of the one before.
        if routing:
            snapshot = RoutingSnapshot(self.step, self.layers, since_routing.rows, since_routing.tokens)
            drifts = self._drift() if drift else None
            if self.world.is_main:
                self._judge(self.sinks.routing(snapshot, routing_measures(snapshot), drifts))
        if report:
            self._record(line)
            self.report_started = time.perf_counter()
        self._stop_if_told()

    def _training_line(self, totals: Totals, lr: float) -> dict[str, Any]:
        seconds = time.perf_counter() - self.report_started
        return {
            "kind": "train",
            "step": self.step,
            "loss": totals.loss_sum / max(totals.supervised_tokens, 1),
            "tokens": totals.tokens,
            "tokens_per_second": totals.tokens / seconds,
            "lr": lr,
            "grad_norm": self.grad_norm,
            "balance_loss": float(totals.balance_loss.mean()),
            "z_loss": float(totals.z_loss.mean()),
            "seconds": seconds,
            "peak_bytes": peak_bytes(self.world.device),
        }

    def _probe_routing(self) -> ProbedRouting:
        return probe_routing(self.model, self.probe, self.recipe.packs_per_micro_batch)

    def _drift(self) -> list[LayerDrift]:
        assert self.base_routing is not None, "drift is due although the base's routing was not taken"
        both = compare_routing(self.base_routing, self._probe_routing(), self.world)
        return routing_drift(
            layers=self.layers,
            base_counts=both.base_counts.numpy(),
            counts=both.counts.numpy(),
            kept=both.kept.numpy(),
            base_probabilities=both.base_probabilities.numpy(),
            probabilities=both.probabilities.numpy(),
        )

    def _evaluate(self) -> None:
        """Loss on the held-out rows, if there are any. Collective."""
        if not self.evaluation:
            return
        paused = time.perf_counter()
        result = held_out(self.model, self.evaluation, self.world)
        self._record(
            {"kind": "eval", "step": self.step, "loss": result.loss, "tokens": result.tokens, "parts": result.parts}
        )
        self._stop_if_told()
        self.report_started += time.perf_counter() - paused

    def _save(self) -> None:
        """Write a checkpoint that a run on any number of ranks can go on from. Collective.

        Raises:
            CheckpointError: the disk refused.
            TrainingError: what would be stored is not finite.
        """
        paused = time.perf_counter()
        tensors = engines.training_state(self.engine, self.world)
        self._refuse_broken(tensors)
        windows = self.world.sum(self.windows.sums.clone()).cpu()
        if self.world.is_main:
            tensors["windows"] = windows

        def barrier(fault: CheckpointError | None = None) -> None:
            with self.world.together(CheckpointError):
                if fault is not None:
                    raise fault

        try:
            path = write_checkpoint(
                self.folder / "checkpoints",
                self.step,
                tensors=tensors,
                state={"step": self.step, "base": self.base, "loader": self.loader.state()},
                rank=self.world.rank,
                ranks=self.world.size,
                barrier=barrier,
                keep=self.recipe.checkpoint.keep,
            )
        except CheckpointError as fault:
            barrier(fault)  # where the ranks that could write theirs are waiting
            raise
        self._record({"kind": "checkpoint", "step": self.step, "path": str(path.relative_to(self.folder))})
        self.report_started += time.perf_counter() - paused

    def _refuse_broken(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a state that training has broken from replacing one that is whole. Communicates."""
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        first = next((names for names in self.world.gather(broken) if names), None)
        if first:
            names = cast(list[str], first)
            self.reasons_to_stop = [
                f"{names[0]} and {len(names) - 1} more trained tensors are not finite, nothing saved"
            ]
        self._stop_if_told()

    def _resume(self, say: Say) -> int:
        """Put in the newest whole checkpoint of this run, if there is one; return the steps taken. Collective."""
        found = newest_checkpoint(self.folder / "checkpoints") if self.world.is_main else None
        folder, skipped = cast(tuple[Path | None, list[str]], self.world.gather(found)[0])
        for sentence in skipped:
            say(sentence)
        if folder is None:
            return 0
        with self.world.together(CheckpointError, DataError):
            state, tensors = open_state(folder)
            if state["base"] != self.base:
                raise CheckpointError(
                    f"{folder}: belongs to other base weights than {self.recipe.model.path} holds now; put them back,"
                    " or start a new run under another name"
                )
            self.loader.restore(state["loader"])
        if self.world.is_main:  # the sums of all ranks since the last reports; the other ranks start from zero
            self.windows.sums.copy_(tensors.read("windows"))
        engines.restore(self.engine, tensors.read, step=state["step"])
        say(f"continuing after step {state['step']} from {folder}")
        return int(state["step"])

    def _open_sinks(self, say: Say) -> Sinks:
        if not self.world.is_main:
            return Sinks([])
        metrics = self.folder / "metrics.jsonl"
        if self.step and metrics.exists():
            try:
                for record in read_metrics(metrics):
                    if record.get("step", 0) <= self.step:
                        self.health.check(record)
            except MonitoringError as error:  # watching a run must not keep it from going on
                say(f"the health rules start without this run's history: {error}")
                self.health = Health()
        monitor = self.recipe.monitor
        return open_sinks(
            self.folder,
            name=self.recipe.name,
            steps=self.recipe.train.steps,
            wandb=monitor.wandb,
            project=monitor.project,
            config=self.recipe.model_dump(mode="json"),
        )

    def _record(self, record: Mapping[str, Any]) -> None:
        if self.world.is_main:
            self.sinks.write(record)
            self._judge(record)

    def _judge(self, record: Mapping[str, Any]) -> None:
        """Write what the health rules find in this record."""
        for finding in self.health.check(record):
            self.sinks.write(finding.record())
            if finding.level == "stop":
                self.reasons_to_stop.append(finding.message)

    def _stop_if_told(self) -> None:
        """End the run on every rank when a rule on rank 0 said so. One number is communicated.

        Raises:
            TrainingError: what was found, and from where the run can be continued.
        """
        told = self.world.sum(torch.tensor(float(len(self.reasons_to_stop)), device=self.world.device))
        if not told:
            return
        reasons = next(reasons for reasons in self.world.gather(self.reasons_to_stop) if reasons)
        kept, _ = newest_checkpoint(self.folder / "checkpoints")
        raise TrainingError(
            f"step {self.step}: stopped: {'; '.join(reasons)}; "  # type: ignore[arg-type]
            + (f"the newest whole checkpoint is {kept}" if kept else "there is no checkpoint yet")
        )


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has held so far: on its GPU, or on the host when it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
