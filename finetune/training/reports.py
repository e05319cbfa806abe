"""The training line and the routing record: when each is due, and their sums over the steps since the last one."""

import resource
from typing import Any

import torch

from data.packing import Batch
from finetune.distributed.world import World
from finetune.model.model import HybridMoEForCausalLM
from finetune.recipe.recipe import Recipe
from finetune.training.evaluation import ProbedRouting, compare_routing, probe_routing
from finetune.training.journal import Journal
from finetune.training.totals import Clock, Totals, Windows
from monitoring.routing import LayerDrift, RoutingSnapshot, routing_drift


class Reports:
    """Reports of one run. Holds the sums and seconds since the last reports, and the base model's probe routing."""

    def __init__(self, recipe: Recipe, world: World, model: HybridMoEForCausalLM, probe: Batch):
        """Measure the base model's routing of the probe tokens. Must run before a checkpoint is restored.

        Args:
            probe: this rank's part of the tokens whose routing is compared with the base model's.
        """
        self.clock = Clock()
        self.grad_norm = 0.0  # of the last step with a finite gradient
        self._recipe, self._world, self._model, self._probe = recipe, world, model, probe
        self._layers = model.settings.moe_layers
        self.windows = Windows(len(self._layers), model.settings.num_experts, world.device)
        self._base_routing = self._probe_routing() if recipe.drift_every_steps else None

    def write(self, journal: Journal, step: int, lr: float) -> bool:
        """Write the reports that are due after this step; return whether any was. Communicates if one is due."""
        train, monitor = self._recipe.train, self._recipe.monitor
        report = step == 1 or is_due(step, train.log_every_steps, train.steps)
        drift_every = self._recipe.drift_every_steps
        drift = drift_every > 0 and is_due(step, drift_every, train.steps)
        routing = monitor.routing_every_steps > 0 and is_due(step, monitor.routing_every_steps, train.steps)
        routing = routing or drift
        if not report and not routing:
            return False
        since_report, since_routing = self.windows.close(self._world, report=report, routing=routing)
        line = self._training_line(since_report, step, lr)
        # Routing first: the training line on the console names the worst layer of the latest routing record.
        if routing and since_routing.tokens > 0:  # else every step of the window was skipped
            snapshot = RoutingSnapshot(step, self._layers, since_routing.rows, since_routing.tokens)
            with self.clock.stopped():
                journal.routing(snapshot, self._drift() if drift else None)
        if report and since_report.tokens > 0:
            journal.write(line)
            self.clock.restart()
        return True

    def state(self) -> dict[str, Any]:
        """State of the open windows for a checkpoint, without their sums."""
        return {"seconds": self.clock.seconds, "grad_norm": self.grad_norm}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue the window of the training line. None, from a checkpoint without this state, starts a new window."""
        if state is None:
            self.windows.sums[0].zero_()
        else:
            self.clock, self.grad_norm = Clock(state["seconds"]), state["grad_norm"]

    def _training_line(self, totals: Totals, step: int, lr: float) -> dict[str, Any]:
        seconds = self.clock.seconds
        return {
            "kind": "train",
            "step": step,
            "loss": totals.loss_sum / max(totals.supervised_tokens, 1),
            "tokens": totals.tokens,
            "tokens_per_second": totals.tokens / seconds,
            "lr": lr,
            "grad_norm": self.grad_norm,
            "balance_loss": float(totals.balance_loss.mean()),
            "z_loss": float(totals.z_loss.mean()),
            "seconds": seconds,
            "peak_bytes": peak_bytes(self._world.device),
        }

    def _probe_routing(self) -> ProbedRouting:
        return probe_routing(self._model, self._probe, self._recipe.packs_per_micro_batch)

    def _drift(self) -> list[LayerDrift]:
        assert self._base_routing is not None, "drift is due although the base's routing was not taken"
        both = compare_routing(self._base_routing, self._probe_routing(), self._world)
        return routing_drift(
            layers=self._layers,
            base_counts=both.base_counts.numpy(),
            counts=both.counts.numpy(),
            kept=both.kept.numpy(),
            base_probabilities=both.base_probabilities.numpy(),
            probabilities=both.probabilities.numpy(),
        )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) is due after this step; always true after the last."""
    return step == last or (every > 0 and step % every == 0)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this rank so far: allocated on its GPU, or resident on the host without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
