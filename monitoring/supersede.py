"""Moving aside of records of steps that a resumed run will repeat.

A killed run has usually passed its newest checkpoint. Its records of later steps are moved, so that metrics.jsonl,
routing/ and an offline W&B run hold every step once. None is deleted.
"""

import json
from pathlib import Path
from typing import Any

from monitoring.files import replace_file

ASIDE = "superseded"


def supersede_lines(path: Path, after: int) -> int:
    """Move lines of steps after `after` from metrics.jsonl to metrics.superseded.jsonl; returns their number.

    If `after` is 0, the run starts again and all lines are moved. The order of lines is preserved. If the process is
    killed in between, the lines are in both files and the next call completes the move.
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
    """The file for moved lines: `metrics.superseded.jsonl` for metrics.jsonl."""
    return path.with_name(f"{path.stem}.{ASIDE}{path.suffix}")


def _step_of_line(line: bytes) -> float:
    """The step of a line; 0 if it has none or is invalid, which readers of the file report."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int | float) else 0


def supersede_snapshots(folder: Path, after: int) -> int:
    """Move `step-N.npz` of steps after `after` (all if 0) to `superseded/` in the folder; returns their number."""
    moved = [path for path in sorted(folder.glob("step-*.npz")) if after == 0 or _step_of_file(path) > after]
    for path in moved:
        (folder / ASIDE).mkdir(exist_ok=True)
        path.rename(_free_name(folder / ASIDE / path.name))
    return len(moved)


def _step_of_file(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def _free_name(path: Path) -> Path:
    """The path, with a number appended if it exists: the same step may be superseded repeatedly."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return free
