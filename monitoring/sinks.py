"""Where records go. Every sink is fed the same records, and none of them can stop a run.

Sinks that take long (pictures, compressed files, W&B) are fed by one thread beside the training, in the same order. A
kill loses the records that this thread has not written yet, at most `MOST_WAITING`; metrics.jsonl and the console are
written before training goes on.

Only rank 0 holds sinks; another rank holds `Sinks([])`, so the training loop need not ask who it is.
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

MOST_WAITING = 64  # records for the sinks beside the training; one of 48 layers with 512 experts holds 0.2 MB

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere that records go."""

    name: str

    def write(self, record: Record) -> None:
        """Take any record but a routing record."""

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        """Take the counts of one window and the `routing` record made from them."""

    def close(self) -> None:
        """Finish what is pending; nothing is written afterwards."""


class RoutingFiles:
    """The sink that keeps raw counts, `routing/step-N.npz`, and the newest heat-map, `routing/heatmap.png`."""

    name = "routing folder"

    def __init__(self, run: Path, after: int | None = None):
        """Keep them in this run folder.

        Args:
            after: the step from which the run continues, 0 for one that begins; None leaves all files where they are.
        """
        self._run = run
        if after is not None and supersede_snapshots(run / "routing", after):
            self._redraw()

    def _redraw(self) -> None:
        """Draw the newest counts that are left; the picture may show those of a step that is taken again."""
        picture, left = self._run / "routing" / "heatmap.png", sorted((self._run / "routing").glob("step-*.npz"))
        if left:
            replace_file(picture, heatmap_png(read_snapshot(left[-1])))
        else:
            picture.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Nothing: only counts are kept here."""

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        write_snapshot(snapshot_path(self._run, snapshot.step), snapshot)
        replace_file(self._run / "routing" / "heatmap.png", heatmap_png(snapshot))

    def close(self) -> None:
        """Nothing: every file was whole when it was written."""


class Sinks:
    """All the sinks of a run. One that raises is closed to further records, with one message; the others go on."""

    def __init__(self, sinks: Sequence[Sink], beside: Sequence[Sink] = ()):
        """Feed `sinks` at once, and those `beside` from a thread of their own."""
        self._sinks, self._beside = list(sinks), list(beside)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sinks")
        self._room = threading.Semaphore(MOST_WAITING)

    def write(self, record: Record) -> None:
        """Give a record to every sink, stamped with the time (`time`, seconds since 1970)."""
        assert "kind" in record, f"a record without a kind: {record}"
        stamped = {**record, "time": time.time()}
        self._feed(lambda sink: sink.write(stamped))

    def routing(
        self,
        snapshot: RoutingSnapshot,
        measures: Sequence[LayerMeasures],
        drift: Sequence[LayerDrift] | None = None,
    ) -> dict[str, Any]:
        """Give one window's routing to every sink, and return its record for the health rules."""
        record = routing_record(snapshot, measures, drift) | {"time": time.time()}
        self._feed(lambda sink: sink.routing(snapshot, record))
        return record

    def close(self) -> None:
        """Wait until every sink has all its records, and close them."""
        self._feed(lambda sink: sink.close())
        self._thread.shutdown()
        self._sinks.clear()
        self._beside.clear()

    def _feed(self, act: Callable[[Sink], None]) -> None:
        """Let every sink act: some now, the others as soon as they come to it; wait if they are far behind."""
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
    """Let each of these act; one that raises leaves the list, with one message."""
    for sink in list(sinks):
        try:
            act(sink)
        except Exception as error:
            sinks.remove(sink)
            log.warning("%s is off for the rest of this run: %s: %s", sink.name, type(error).__name__, error)
            with contextlib.suppress(Exception):  # said once already; a bar must not go on drawing
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
    """The sinks of a real run, for rank 0: console, metrics.jsonl, the routing folder and W&B unless it is off.

    Args:
        run: the run folder; all files lie in it.
        name: of the run, as W&B shows it.
        steps: the last optimizer step, for the bar and the time left.
        config: the effective recipe, as W&B shows it.
        after: the step from which the run continues, 0 for one that begins: what was recorded of later steps is moved
            aside, so that every step is recorded once. None leaves everything where it is.
    """

    def open_wandb() -> Sink:
        # Imported here because it takes half a second, which a run without W&B need not pay.
        from monitoring.wandb_rows import lost_records, take_back_rows
        from monitoring.wandb_sink import Wandb

        held = None if after is None else take_back_rows(run / "wandb", run_id(run), after)
        mode: Literal["online", "offline"] = "online" if wandb == "online" else "offline"
        sink = Wandb(run, name=name, mode=mode, project=project, config=config)
        for record in [] if held is None or after is None else lost_records(run, held, after):
            if record["kind"] != "routing":
                sink.write(record)
            elif (counts := snapshot_path(run, record["step"])).exists():  # else lost too
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
    """The sinks that can be opened; of the others it is said that they are off."""
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
    """Which package is missing, and the command that installs it where this process looks for it."""
    module = (error.name or "").partition(".")[0]
    package = {"PIL": "pillow"}.get(module, module)
    return f"the package {package} is not installed; get it with: {sys.executable} -m pip install {package}"
