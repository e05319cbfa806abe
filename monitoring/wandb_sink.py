"""The W&B sink: scalars, a histogram of expert load for each layer, a heat-map, alerts. Offline by default.

An offline run needs neither account nor network; `wandb sync` sends it later. A resumed run keeps its id, so that its
parts become one run. Of steps repeated after a kill, an offline run holds the later rows (monitoring/wandb_rows.py), an
online one the earlier rows, since W&B ignores further rows of a known step.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from numpy.typing import NDArray

from monitoring.charts import heatmap
from monitoring.metrics import Record, plain
from monitoring.routing import RoutingSnapshot
from monitoring.run_id import run_id

MOST_BINS = wandb.Histogram.MAX_LENGTH
ALERT_LEVELS = {"warn": "WARN", "alert": "ERROR", "stop": "ERROR"}
LOAD_SCALARS = ("max_share", "max_token_share", "effective_experts", "max_vio", "cv", "dead", "starved")
DRIFT_SCALARS = ("load_bits", "kept", "probability_bits", "busiest_kept", "effective_ratio", "newly_dead")
STEP = "train/step"

log = logging.getLogger(__name__)


class Wandb:
    """The sink that writes a W&B run into `run/wandb/`, without console output of its own."""

    name = "W&B"

    def __init__(
        self, run: Path, *, name: str, mode: Literal["offline", "online"], project: str, config: Mapping[str, Any]
    ):
        self._ended = False
        self._run = open_run(run, name=name, mode=mode, project=project, config=config)
        self._run.define_metric(STEP)
        for pattern in ("train/*", "eval/*", "routing/*"):
            self._run.define_metric(pattern, step_metric=STEP)
        # Otherwise every histogram is stored twice, the second time in the run's summary.
        self._run.define_metric("moe/*", step_metric=STEP, summary="none")

    def write(self, record: Record) -> None:
        kind = record["kind"]
        if kind in ("train", "eval"):
            self._log(record["step"], {f"{kind}/{key}": value for key, value in _scalars(record).items()})
        elif kind == "finding" and record["level"] in ALERT_LEVELS:  # alerts are sent by mail, so not for `info`
            self._run.alert(_title(record), record["message"], level=ALERT_LEVELS[record["level"]])
        elif kind == "end":
            self._ended = True

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        names = {layer: f"moe/layer_{layer:0{_digits(snapshot)}d}" for layer in snapshot.layers}
        values: dict[str, Any] = {"moe/load_heatmap": wandb.Image(heatmap(snapshot)), **_overview(record)}
        for layer, counts in zip(snapshot.layers, snapshot.counts, strict=True):
            values[f"{names[layer]}/expert_load"] = wandb.Histogram(np_histogram=binned(counts))
        for entry in record["layers"]:
            name, drift = names[entry["layer"]], entry.get("drift", {})
            values |= {f"{name}/{key}": entry[key] for key in LOAD_SCALARS}
            values |= {f"{name}/drift_{key}": drift[key] for key in DRIFT_SCALARS if drift.get(key) is not None}
        self._log(snapshot.step, values)

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._ended else 1)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # The step is passed explicitly: W&B's own counter restarts at 0 in a resumed offline run.
        self._run.log({STEP: step, **values}, step=step)


def open_run(
    run: Path, *, name: str, mode: Literal["offline", "online"], project: str, config: Mapping[str, Any]
) -> "wandb.Run":
    """Start a W&B run with its files in the run folder; without key or connection, log it and fall back to offline."""
    # Otherwise W&B asks a terminal for a key, without a timeout.
    wandb.setup(settings=wandb.Settings(silent=True, login_timeout=30))
    settings = wandb.Settings(silent=True, console="off", disable_code=True, init_timeout=60, finish_timeout=120)
    given: dict[str, Any] = {"dir": run, "id": run_id(run), "name": name, "project": project, "settings": settings}
    given["config"] = plain(config)
    run.mkdir(parents=True, exist_ok=True)
    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow", **given)
        except (wandb.Error, TimeoutError) as error:
            log.warning(
                "W&B cannot be reached (%s), so this run is recorded offline; send it later with `wandb login` and "
                "`wandb sync %s/wandb/offline-run-*`",
                str(error).partition("\n")[0],
                run,
            )
            wandb.teardown()  # the failed attempt still holds the id
    return wandb.init(mode="offline", **given)


def binned(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts and bin edges over expert ids: one expert a bin, or as few neighbours as W&B's limit allows."""
    width = -(-counts.size // MOST_BINS)
    edges = np.append(np.arange(0, counts.size, width), counts.size)
    return np.add.reduceat(counts, edges[:-1]), edges


def _digits(snapshot: RoutingSnapshot) -> int:
    """Digits of the largest layer number, at least two, since W&B sorts names as text."""
    return max(2, len(str(max(snapshot.layers, default=0))))


def _overview(record: Record) -> dict[str, int | float]:
    """The worst layer's value of each measure, for comparing runs."""
    layers = record["layers"]
    drifts = [layer["drift"] for layer in layers if "drift" in layer]
    overview = {
        "routing/highest_max_vio": max(layer["max_vio"] for layer in layers),
        "routing/fewest_effective_experts": min(layer["effective_experts"] for layer in layers),
        "routing/dead_experts": sum(layer["dead"] for layer in layers),
    }
    if drifts:
        overview["routing/highest_drift_bits"] = max(drift["load_bits"] for drift in drifts)
        overview["routing/lowest_kept"] = min(drift["kept"] for drift in drifts)
    return overview


def _scalars(fields: Record) -> dict[str, int | float]:
    numbers = {k: v for k, v in fields.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: value for key, value in numbers.items() if key not in ("step", "time")}


def _title(record: Record) -> str:
    layer = record["layer"]
    return record["rule"] if layer is None else f"{record['rule']}, layer {layer}"
