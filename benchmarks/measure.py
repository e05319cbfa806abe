"""Helpers of the benchmarks: GPU time of a function, a description of the machine, and writing of results."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

PEAK = 798e12  # dense bfloat16 operations a second of an H100 or H200 (SXM)


def milliseconds(function: Callable[[], object], *, repeats: int = 20, warm_up: int = 3) -> tuple[float, float]:
    """Median time of one call on the GPU in ms, and half of the interquartile range.

    A large buffer is overwritten before every call, so that its data is not in the L2 cache.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(warm_up):
        function()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), (quartiles[2] - quartiles[0]) / 2


def machine() -> dict[str, str]:
    """The machine, versions and command of a measurement."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        # Absolute paths are reduced to their last part, so that the command is valid on another machine.
        "command": " ".join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}"]
            + [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
        ),
    }


def write_results(path: Path, values: dict[str, Any]) -> None:
    """Write results as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(machine() | values, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
