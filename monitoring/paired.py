"""The change of a loss between two measurements of the same batches, and how sure it is."""

import math
from collections.abc import Sequence


def paired_change(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]
) -> tuple[float, float] | None:
    """Change of the mean loss from `before` to `after`, below 0 when it fell, and the standard error of that.

    The error is that of a ratio of sums over micro-batches whose parts are paired (the same tokens before and after),
    so what makes one micro-batch harder than another cancels. None when the two were not measured on the same ones.
    """
    if [n for _, n in before] != [n for _, n in after] or len(before) < 2:
        return None
    differences = [(b[0] - a[0], a[1]) for a, b in zip(before, after, strict=True)]
    tokens = sum(n for _, n in differences)
    change = sum(d for d, _ in differences) / tokens
    spread = sum((d - change * n) ** 2 for d, n in differences)
    parts = len(differences)
    return change, math.sqrt(spread * parts / (parts - 1)) / tokens
