"""metrics.jsonl: one JSON object a line, appended and flushed; writing and reading.

Every step occurs once: a run that resumes from a checkpoint moves the lines of later steps, which it will repeat, to
metrics.superseded.jsonl.

`kind` is the type of a line:

    start       step (the run continues after it; 0 for a new run) and a description of the run
    train       step, loss, tokens, tokens_per_second, lr, grad_norm, balance_loss, z_loss, seconds, peak_bytes
    eval        step, loss, tokens
    routing     step, tokens, experts, layers: one object of measures per MoE layer (monitoring/routing.py)
    finding     step, level, rule, layer, message (monitoring/health.py)
    action      step, message
    checkpoint  step, path, seconds (to write it), blocked_seconds (during which training waited)
    end         step

A number that is not finite is written as null, since JSON cannot represent it.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monitoring.files import MonitoringError
from monitoring.json_file import FileError, FormError, MissingFileError, load_text, read_bytes
from monitoring.lines import problem_of
from monitoring.routing import RoutingSnapshot
from monitoring.supersede import aside_of, supersede_lines

Record = Mapping[str, Any]
MOST_BYTES = 4 << 30  # a line has a few KB

log = logging.getLogger(__name__)


class MetricsFile:
    """The sink that appends to metrics.jsonl. When it opens a file, an incomplete last line is removed."""

    name = "metrics.jsonl"

    def __init__(self, path: Path, after: int | None = None):
        """Open the file of a run.

        Args:
            after: the step from which the run resumes, 0 for a new run; later lines are moved. None: no line is moved.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        if after is not None and (moved := supersede_lines(path, after)):
            log.warning(
                "%s: %d lines of steps after %d moved to %s, since the run takes these steps again",
                *(path, moved, after, aside_of(path).name),
            )
        self._file = path.open("ab")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(plain(record), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def routing(self, snapshot: RoutingSnapshot, record: Record) -> None:
        self.write(record)

    def close(self) -> None:
        self._file.close()


def plain(value: Any) -> Any:
    """A value as JSON types: numpy numbers and arrays become Python's, numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _cut_torn_line(path: Path) -> None:
    """Remove whatever follows the last newline, and log it."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            log.warning("%s ended in the middle of a line, which was cut off (%d bytes)", path, size - end)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a run, as if it had never been interrupted.

    Lines of repeated steps may still be in the file if the run was killed while moving them, or if an older version
    wrote it: a `start` at step N discards preceding lines of later steps, one at step 0 all lines. A last line without
    newline is incomplete and ignored.

    Raises:
        MonitoringError: no such file, or an invalid line.
    """
    path = Path(path)
    try:
        whole, _, _ = read_bytes(path, MOST_BYTES).rpartition(b"\n")
    except MissingFileError:
        raise MonitoringError(f"{path}: no such file; is this the folder of a run?") from None
    except FileError as error:
        raise MonitoringError(str(error)) from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        record = _parse(line, f"{path}:{number}")
        if record["kind"] == "start":
            step = record.get("step", 0)
            records = [old for old in records if step and (old["kind"] == "start" or old.get("step", 0) <= step)]
        records.append(record)
    return records


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = load_text(line.decode())
    except UnicodeDecodeError:
        raise MonitoringError(f"{where}: not UTF-8; delete the line to go on without it") from None
    except FormError as error:
        raise MonitoringError(f"{where}: {error}; delete the line to go on without it") from None
    problem = problem_of(record)
    if problem is not None:
        raise MonitoringError(f"{where}: {problem}; delete the line to go on without it")
    assert isinstance(record, dict)
    return record
