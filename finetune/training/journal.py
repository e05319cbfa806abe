"""Writes records of a run to the sinks, then applies the health rules and writes their findings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.distributed.world import World
from finetune.recipe.recipe import Recipe
from monitoring.health import Health
from monitoring.routing import LayerDrift, RoutingSnapshot, routing_measures
from monitoring.sinks import Sinks, open_sinks


class Journal:
    """The records of one run. Rank 0 writes; on the other ranks every call does nothing."""

    def __init__(self, recipe: Recipe, folder: Path, world: World, health: Health, step: int):
        """Open the sinks, and move aside records of an earlier start for steps after `step`.

        Args:
            health: the health rules and their state, which every checkpoint stores.
        """
        self.reasons_to_stop: list[str] = []  # findings of level `stop`
        self._is_main, self._health = world.is_main, health
        self._sinks = _sinks(recipe, folder, step) if world.is_main else Sinks([])

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record of any kind but `routing`, and its findings."""
        if self._is_main:
            self._sinks.write(record)
            self._judge(record)

    def routing(self, snapshot: RoutingSnapshot, drifts: Sequence[LayerDrift] | None) -> None:
        """Write the routing record of one window, and its findings."""
        if self._is_main:
            self._judge(self._sinks.routing(snapshot, routing_measures(snapshot), drifts))

    def close(self) -> None:
        """Flush and close the sinks. Later records are not written."""
        self._sinks.close()

    def _judge(self, record: Mapping[str, Any]) -> None:
        for finding in self._health.check(record):
            self._sinks.write(finding.record())
            if finding.level == "stop":
                self.reasons_to_stop.append(finding.message)


def _sinks(recipe: Recipe, folder: Path, step: int) -> Sinks:
    return open_sinks(
        folder,
        name=recipe.name,
        steps=recipe.train.steps,
        wandb=recipe.monitor.wandb,
        project=recipe.monitor.project,
        config=recipe.model_dump(mode="json"),
        after=step,
    )
