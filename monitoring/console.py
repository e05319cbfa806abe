"""Console output of a run: a progress bar on a terminal, otherwise one plain line for each record."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import rich.console
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from monitoring.metrics import Record
from monitoring.routing import RoutingSnapshot

PLAIN_WIDTH = 100
STYLES = {"warn": "yellow", "alert": "bold red", "stop": "bold white on red"}
MOST_ALIKE = 2  # findings of the same rule, level and step that are shown individually
_NOT_SHOWN = ("kind", "step", "time", "parts")


def open_console() -> rich.console.Console:
    """Standard output: as wide as the terminal, or 100 columns for a file or a pipe."""
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, width=PLAIN_WIDTH)


class Console:
    """The sink for console output. Only one rank may hold it."""

    name = "console"

    def __init__(
        self,
        *,
        steps: int,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Create the console of a run that ends after optimizer step `steps`.

        Args:
            clock: returns seconds. The remaining time is estimated from arrival times of records, so it includes
                evaluation and checkpoints.
        """
        self._steps = steps
        self._console = console or open_console()
        self._clock = clock
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=50)  # (seconds, step) of the latest train records
        self._worst_load: str | None = None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._alike: tuple[Any, ...] = ()  # step, level and rule of the last finding
        self._alike_count = 0

    def write(self, record: Record) -> None:
        kind = record["kind"]
        if kind != "finding":
            self._end_findings()
        if kind in ("start", "train") and self._console.is_terminal and self._live is None:
            self._start_bar(record.get("step", 0))
        if kind == "start":
            self._arrivals.append((self._clock(), record.get("step", 0)))
        elif kind == "train":
            self._train(record)
        elif kind == "finding":
            self._finding(record)
        elif kind == "end":
            self.close()
        elif kind == "checkpoint":
            self._say(f"{_step(record)}{saved(record)}")
        elif kind == "action":
            self._say(f"{_step(record)}{record['message']}")
        else:
            self._say(f"{_step(record)}{kind}: {describe(record)}")

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        """Remember the layer whose busiest expert exceeds the mean most; the following lines show it."""
        worst = max(record["layers"], key=lambda layer: layer["max_vio"])
        self._worst_load = f"worst load {worst['max_vio'] + 1:.1f}x mean (layer {worst['layer']})"

    def close(self) -> None:
        self._end_findings()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _train(self, record: Record) -> None:
        self._arrivals.append((self._clock(), record["step"]))
        parts = _train_parts(record)
        parts += [text for text in (self._worst_load, _memory(record), self._left()) if text is not None]
        if self._live is None or self._progress is None:
            self._say(" | ".join([f"step {record['step']}/{self._steps}", *parts]))
            return
        self._progress.update(self._progress.task_ids[0], completed=record["step"])
        self._live.update(Group(self._progress, Text(" | ".join(parts), style="dim")))

    def _finding(self, record: Record) -> None:
        if record["level"] == "info":
            return
        alike = (record["step"], record["level"], record["rule"])
        if alike != self._alike:
            self._end_findings()
            self._alike = alike
        self._alike_count += 1
        if self._alike_count > MOST_ALIKE:
            return
        text = f"{_step(record)}{record['level'].upper()} {record['rule']}: {record['message']}"
        self._console.print(Text(text, style=STYLES[record["level"]]), soft_wrap=True)

    def _end_findings(self) -> None:
        """Print the number of findings that were not shown: one line for each of 48 layers would hide other output."""
        if self._alike_count > MOST_ALIKE:
            step, level, rule = self._alike
            more = self._alike_count - MOST_ALIKE
            text = f"step {step} | {level.upper()} {rule}: and {more} more layers, which metrics.jsonl names"
            self._console.print(Text(text, style=STYLES[level]), soft_wrap=True)
        self._alike, self._alike_count = (), 0

    def _say(self, text: str) -> None:
        # Lines are not wrapped, since a file or a pipe may be searched with grep.
        self._console.print(escape(text), soft_wrap=True)

    def _start_bar(self, step: int) -> None:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, expand=True)
        self._progress.add_task("train", total=self._steps, completed=step)
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._live.start()

    def _left(self) -> str | None:
        (then, first), (now, last) = self._arrivals[0], self._arrivals[-1]
        if last <= first:
            return None
        return f"{duration((now - then) / (last - first) * (self._steps - last))} left"


def _train_parts(record: Record) -> list[str]:
    shapes = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.3f}"),
        ("balance_loss", "balance loss {:.4f}"),
        ("z_loss", "z loss {:.4f}"),
    )
    return [shape.format(record[key]) for key, shape in shapes if record.get(key) is not None]


def _memory(record: Record) -> str | None:
    peak = record.get("peak_bytes")
    return None if peak is None else f"{peak / 2**30:.2f} GiB"


def _step(record: Record) -> str:
    return f"step {record['step']} | " if "step" in record else ""


def describe(record: Record) -> str:
    """The scalar fields of a record in one line: `loss 2.3125, tokens 4,096`."""
    shown = {
        key: value for key, value in record.items() if key not in _NOT_SHOWN and not isinstance(value, list | dict)
    }
    return ", ".join(f"{key} {_show(value)}" for key, value in shown.items())


def saved(record: Record) -> str:
    """A checkpoint record as text: `PATH is written, in 4.2s beside the training, which waited 0.1s for it`."""
    text = f"{record['path']} is written"
    if record.get("seconds") is None or record.get("blocked_seconds") is None:
        return text
    waited = _short_duration(record["blocked_seconds"])
    return f"{text}, in {_short_duration(record['seconds'])} beside the training, which waited {waited} for it"


def _short_duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 9.95 else duration(seconds)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A duration in seconds as text: 9s, 2m 05s, 3h 20m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02d}m"
