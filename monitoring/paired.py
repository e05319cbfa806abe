"""Paired comparison of a loss measured twice on the same batches."""

import math
from collections.abc import Sequence


def paired_change(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]
) -> tuple[float, float] | None:
    """Change of the mean loss from `before` to `after` (negative: it fell), and its standard error.

    The error is that of a ratio estimator over micro-batches, paired by the same tokens before and after, so
    differences in difficulty between micro-batches cancel.

    Args:
        before: summed loss and number of tokens of each micro-batch.
        after: likewise.

    Returns:
        Change and error; None if fewer than two micro-batches, or if their token counts differ.
    """
    if [n for _, n in before] != [n for _, n in after] or len(before) < 2:
        return None
    differences = [(b[0] - a[0], a[1]) for a, b in zip(before, after, strict=True)]
    tokens = sum(n for _, n in differences)
    change = sum(d for d, _ in differences) / tokens
    spread = sum((d - change * n) ** 2 for d, n in differences)
    parts = len(differences)
    return change, math.sqrt(spread * parts / (parts - 1)) / tokens
