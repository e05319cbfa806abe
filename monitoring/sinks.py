"""Destinations of records. Every sink receives the same records, and none can stop a run.

Slow sinks (pictures, compressed files, W&B) are fed in order by a background thread. A kill loses the records that it
has not written, at most `MOST_WAITING`. metrics.jsonl and the console are written synchronously.

Only rank 0 has sinks. Other ranks use `Sinks([])`, so the training loop does not depend on the rank.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

from monitoring.charts import heatmap_png
from monitoring.console import Console
from monitoring.files import replace_file
from monitoring.metrics import MetricsFile, Record
from monitoring.routing import (
    LayerDrift,
    LayerMeasures,
    RoutingSnapshot,
    read_snapshot,
    routing_record,
    snapshot_path,
    write_snapshot,
)
from monitoring.run_id import run_id
from monitoring.supersede import supersede_snapshots

WandbMode = Literal["offline", "online", "off"]

MOST_WAITING = 64  # queue length of the background sinks; a record of 48 layers with 512 experts holds 0.2 MB

log = logging.getLogger(__name__)


class Sink(Protocol):
    """A destination of records."""

    name: str

    def write(self, record: Record) -> None:
        """Handle any record except a routing record."""

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        """Handle the counts of one window and the `routing` record computed from them."""

    def close(self) -> None:
        """Finish pending work; nothing is written afterwards."""


class RoutingFiles:
    """The sink for raw counts, `routing/step-N.npz`, and the latest heat-map, `routing/heatmap.png`."""

    name = "routing folder"

    def __init__(self, run: Path, after: int | None = None):
        """Write to `routing/` in a run folder.

        Args:
            after: the step from which the run resumes, 0 for a new run; later files are moved. None: no file is moved.
        """
        self._run = run
        if after is not None and supersede_snapshots(run / "routing", after):
            self._redraw()

    def _redraw(self) -> None:
        """Redraw the heat-map from the newest remaining counts, since it may show a step that will be repeated."""
        picture, left = self._run / "routing" / "heatmap.png", sorted((self._run / "routing").glob("step-*.npz"))
        if left:
            replace_file(picture, heatmap_png(read_snapshot(left[-1])))
        else:
            picture.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Do nothing: only counts are stored here."""

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        write_snapshot(snapshot_path(self._run, snapshot.step), snapshot)
        replace_file(self._run / "routing" / "heatmap.png", heatmap_png(snapshot))

    def close(self) -> None:
        """Do nothing: every file is complete once written."""


class Sinks:
    """All sinks of a run. A sink that raises is logged and removed; the others continue."""

    def __init__(self, sinks: Sequence[Sink], beside: Sequence[Sink] = ()):
        """Feed `sinks` synchronously, and `beside` from a background thread."""
        self._sinks, self._beside = list(sinks), list(beside)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sinks")
        self._room = threading.Semaphore(MOST_WAITING)

    def write(self, record: Record) -> None:
        """Pass a record to every sink, with a time stamp added (`time`, seconds since 1970)."""
        assert "kind" in record, f"a record without a kind: {record}"
        stamped = {**record, "time": time.time()}
        self._feed(lambda sink: sink.write(stamped))

    def routing(
        self,
        snapshot: RoutingSnapshot,
        measures: Sequence[LayerMeasures],
        drift: Sequence[LayerDrift] | None = None,
    ) -> dict[str, Any]:
        """Pass one window's routing to every sink; returns its record for the health rules."""
        record = routing_record(snapshot, measures, drift) | {"time": time.time()}
        self._feed(lambda sink: sink.routing(snapshot, record))
        return record

    def close(self) -> None:
        """Wait until every sink has received all records, then close them."""
        self._feed(lambda sink: sink.close())
        self._thread.shutdown()
        self._sinks.clear()
        self._beside.clear()

    def _feed(self, act: Callable[[Sink], None]) -> None:
        """Call `act` for every sink, the background ones in their thread; blocks if its queue is full."""
        _each(self._sinks, act)
        if self._beside:
            self._room.acquire()
            self._thread.submit(self._act_beside, act)

    def _act_beside(self, act: Callable[[Sink], None]) -> None:
        try:
            _each(self._beside, act)
        finally:
            self._room.release()


def _each(sinks: list[Sink], act: Callable[[Sink], None]) -> None:
    """Call `act` for each sink; one that raises is logged and removed from the list."""
    for sink in list(sinks):
        try:
            act(sink)
        except Exception as error:
            sinks.remove(sink)
            log.warning("%s is off for the rest of this run: %s: %s", sink.name, type(error).__name__, error)
            with contextlib.suppress(Exception):  # already logged; a progress bar must stop drawing
                sink.close()


def open_sinks(
    run: Path,
    *,
    name: str,
    steps: int,
    wandb: WandbMode,
    project: str,
    config: Mapping[str, Any],
    after: int | None = None,
) -> Sinks:
    """Create the sinks of rank 0: console, metrics.jsonl, the routing folder, and W&B unless off.

    Args:
        run: the run folder, which holds all files.
        name: name of the run in W&B.
        steps: the last optimizer step, for the progress bar and the remaining time.
        config: the effective recipe, for W&B.
        after: the step from which the run resumes, 0 for a new run: records of later steps are moved aside, so that
            every step is recorded once. None: nothing is moved.
    """

    def open_wandb() -> Sink:
        # Imported here since it takes half a second, which only runs with W&B need.
        from monitoring.wandb_rows import lost_records, take_back_rows
        from monitoring.wandb_sink import Wandb

        held = None if after is None else take_back_rows(run / "wandb", run_id(run), after)
        mode: Literal["online", "offline"] = "online" if wandb == "online" else "offline"
        sink = Wandb(run, name=name, mode=mode, project=project, config=config)
        for record in [] if held is None or after is None else lost_records(run, held, after):
            if record["kind"] != "routing":
                sink.write(record)
            elif (counts := snapshot_path(run, record["step"])).exists():  # otherwise its counts are lost too
                sink.routing(read_snapshot(counts), record)
        return sink

    at_once: dict[str, Callable[[], Sink]] = {
        "console": lambda: Console(steps=steps),
        "metrics.jsonl": lambda: MetricsFile(run / "metrics.jsonl", after),
    }
    beside: dict[str, Callable[[], Sink]] = {"routing folder": lambda: RoutingFiles(run, after)}
    if wandb != "off":
        beside["W&B"] = open_wandb
    return Sinks(_opened(at_once), _opened(beside))


def _opened(openers: Mapping[str, Callable[[], Sink]]) -> list[Sink]:
    """The sinks that can be opened; the others are logged as off."""
    sinks = []
    for what, open_sink in openers.items():
        try:
            sinks.append(open_sink())
        except ModuleNotFoundError as error:
            log.warning("%s is off for this run: %s", what, how_to_get(error))
        except Exception as error:
            log.warning("%s is off for this run: %s: %s", what, type(error).__name__, error)
    return sinks


def how_to_get(error: ModuleNotFoundError) -> str:
    """The missing package, and the command that installs it into this Python."""
    module = (error.name or "").partition(".")[0]
    package = {"PIL": "pillow"}.get(module, module)
    return f"the package {package} is not installed; get it with: {sys.executable} -m pip install {package}"
