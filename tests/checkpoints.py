"""A checkpoint as a run leaves it, for tests that need one and no training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.checkpoint.writer import Writer


def write_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, Tensor],
    state: Mapping[str, Any],
    rank: int = 0,
    ranks: int = 1,
    keep: int = 1,
) -> Path:
    """Write what this rank answers for, and wait for it."""
    writer = Writer(root, rank=rank, ranks=ranks, token="test", keep=keep)
    try:
        writer.begin(step, tensors, state)
        writer.wait()
        writer.finish()
    finally:
        writer.close()
    return root / f"step-{step}"
