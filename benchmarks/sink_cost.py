"""What one routing record costs: in each sink, and in the training thread, on a CPU that ranks keep busy.

Counts have the size of Qwen3-Next's: 48 layers with 512 experts; drift is measured in every record. One process for
each core computes all the time, as the ranks of a run on CPUs do.

    python -m benchmarks.sink_cost
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import write_results
from monitoring.console import Console
from monitoring.metrics import MetricsFile
from monitoring.routing import (
    LayerDrift,
    LayerMeasures,
    RoutingSnapshot,
    routing_drift,
    routing_measures,
    routing_record,
)
from monitoring.sinks import RoutingFiles, Sink, open_sinks
from monitoring.wandb_sink import Wandb

RESULTS = Path("benchmarks/results/sink_cost.json")
LAYERS, EXPERTS, TOKENS, TOP_K = 48, 512, 65_536, 10
SECONDS_BETWEEN = 2.0  # pause between records, which in a run are seconds or minutes apart


def snapshot(step: int) -> RoutingSnapshot:
    """Uneven counts, as from a router on one kind of text."""
    draw = np.random.default_rng(step)
    share = draw.gamma(0.7, size=(LAYERS, EXPERTS))
    counts = (share / share.sum(1, keepdims=True) * TOKENS * TOP_K).astype(np.int64)
    return RoutingSnapshot(step, tuple(range(LAYERS)), counts, TOKENS)


def measured(taken: RoutingSnapshot) -> tuple[list[LayerMeasures], list[LayerDrift]]:
    base = snapshot(0).counts
    drift = routing_drift(
        layers=taken.layers, base_counts=base, counts=taken.counts, kept=np.full(LAYERS, 0.9, np.float64)
    )
    return routing_measures(taken), drift


def burn() -> None:
    matrix = np.ones((256, 256))
    while True:
        matrix @ matrix


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    burning = [multiprocessing.Process(target=burn, daemon=True) for _ in range(count)]
    for process in burning:
        process.start()
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.join()


def milliseconds(function: Callable[[int], object], records: int, pause: float = 0.0) -> list[float]:
    """Time in ms of each of `records` calls with a step; a first call, which opens files and fonts, is not counted."""
    times = []
    for step in range(1, records + 2):
        time.sleep(pause)
        began = time.perf_counter()
        function(step)
        times.append(1000 * (time.perf_counter() - began))
    return times[1:]


def in_each_sink(run: Path, records: int) -> dict[str, list[float]]:
    sinks: list[Sink] = [
        Console(steps=records),
        MetricsFile(run / "metrics.jsonl"),
        RoutingFiles(run),
        Wandb(run, name="n", mode="offline", project="p", config={}),
    ]
    prepared = {step: snapshot(step) for step in range(1, records + 2)}
    written = {step: routing_record(taken, *measured(taken)) for step, taken in prepared.items()}
    found: dict[str, list[float]] = {}
    for sink in sinks:

        def feed(step: int, sink: Sink = sink) -> None:
            sink.routing(prepared[step], written[step])

        found[sink.name] = milliseconds(feed, records)
        sink.close()
    return found


def in_the_training_thread(run: Path, records: int) -> tuple[list[float], float]:
    """Time of each `Sinks.routing` call with all sinks of a run, and of the final wait for them, in ms."""
    sinks = open_sinks(run, name="n", steps=records, wandb="offline", project="p", config={})
    prepared = {step: snapshot(step) for step in range(1, records + 2)}
    of = {step: measured(taken) for step, taken in prepared.items()}
    times = milliseconds(lambda step: sinks.routing(prepared[step], *of[step]), records, SECONDS_BETWEEN)
    began = time.perf_counter()
    sinks.close()
    return times, 1000 * (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--records", type=int, default=10)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows = {}
    for busy in (0, cores):
        silent = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, busy_cores(busy), silent:
            alone = in_each_sink(Path(folder) / "each", options.records)
            blocked, closing = in_the_training_thread(Path(folder) / "all", options.records)
        row = {name: round(statistics.median(times), 1) for name, times in alone.items()}
        row |= {"training thread": round(statistics.median(blocked), 1), "worst": round(max(blocked), 1)}
        row["close"] = round(closing, 1)
        rows[f"{busy} other processes"] = row
        print(f"{busy} other processes on {cores} cores, milliseconds a record: {row}", flush=True)
    write_results(options.out, {"layers": LAYERS, "experts": EXPERTS, "cores": cores, "milliseconds": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
