"""What a run takes back when it continues from a checkpoint: the records of later steps, which it will take again.

A killed run has usually gone further than its newest checkpoint. Its records of those steps are moved aside, so that
metrics.jsonl, routing/ and an offline W&B run hold every step once, for any reader; none is deleted.
"""

import json
from pathlib import Path
from typing import Any

from monitoring.files import replace_file

ASIDE = "superseded"


def supersede_lines(path: Path, after: int) -> int:
    """Move the lines of metrics.jsonl that belong to steps after `after` to metrics.superseded.jsonl; how many.

    With `after` 0 the run begins anew, and all of them are moved. The order of all lines stays. A kill in between
    leaves the lines in both files, and the next call completes it.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        (moved if after == 0 or _step_of_line(line) > after else kept).append(line)
    if moved:
        aside = aside_of(path)
        before, more = aside.read_bytes() if aside.exists() else b"", b"".join(moved)
        if not before.endswith(more):
            replace_file(aside, before + more)
        replace_file(path, b"".join(kept))
    return len(moved)


def aside_of(path: Path) -> Path:
    """Where the lines of this file go: `metrics.superseded.jsonl` for metrics.jsonl."""
    return path.with_name(f"{path.stem}.{ASIDE}{path.suffix}")


def _step_of_line(line: bytes) -> float:
    """The step of a line; 0 for one that says none, which is left to its readers."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int | float) else 0


def supersede_snapshots(folder: Path, after: int) -> int:
    """Move `step-N.npz` of steps after `after`, of all if it is 0, to `superseded/` in the same folder; how many."""
    moved = [path for path in sorted(folder.glob("step-*.npz")) if after == 0 or _step_of_file(path) > after]
    for path in moved:
        (folder / ASIDE).mkdir(exist_ok=True)
        path.rename(_free_name(folder / ASIDE / path.name))
    return len(moved)


def _step_of_file(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def _free_name(path: Path) -> Path:
    """The path, with a number behind its name if it is in use: the same step may be taken back more than once."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return free
