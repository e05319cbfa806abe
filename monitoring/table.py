"""Expert utilisation as text: one line a layer, with its load drawn in block characters."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from monitoring.console import open_console
from monitoring.routing import LayerDrift, LayerMeasures, RoutingSnapshot

BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
FULL_BLOCK = 4.0  # times the mean load; an even layer is a line at a quarter of the height
MOST_COLUMNS = 64
NUMBERS_WIDTH = 64  # columns of everything except the drawing


def utilisation_table(
    snapshot: RoutingSnapshot,
    measures: Sequence[LayerMeasures],
    drift: Sequence[LayerDrift] | None = None,
    kinds: Mapping[int, str] | None = None,
    *,
    columns: int = MOST_COLUMNS,
    unicode: bool = True,
) -> Table:
    """A table of how each layer used its experts in the window of `snapshot`.

    Args:
        kinds: the token mixer of each layer ("attention", "DeltaNet"), by layer number.
        columns: maximum width of the drawing; if there are more experts, a column shows the mean of several.
    """
    drifts = {d.layer: d for d in drift or ()}
    shared = _experts_per_column(snapshot.experts, columns)
    note = f", {shared} experts a column" if shared > 1 else ""
    title = f"Expert load per layer, step {snapshot.step}, {snapshot.tokens:,} tokens{note}"
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    if kinds:
        table.add_column("kind", no_wrap=True)
    for heading in ("busiest", "effective", "MaxVio", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    if drifts:
        table.add_column("drift", justify="right", no_wrap=True)
    table.add_column("load by expert", no_wrap=True)
    for measure, counts in zip(measures, snapshot.counts, strict=True):
        moved = drifts.get(measure.layer)
        table.add_row(
            str(measure.layer),
            *([kinds.get(measure.layer, "")] if kinds else []),
            f"{measure.max_share:.1%}",
            f"{measure.effective_experts:.1f} of {snapshot.experts}",
            f"{measure.max_vio:.2f}",
            str(measure.dead),
            *([f"{moved.load_bits:.4f}" if moved else "-"] if drifts else []),
            load_row(counts, columns=columns, unicode=unicode),
        )
    return table


def print_utilisation(
    snapshot: RoutingSnapshot,
    measures: Sequence[LayerMeasures],
    drift: Sequence[LayerDrift] | None = None,
    kinds: Mapping[int, str] | None = None,
    console: Console | None = None,
) -> None:
    """Print the table in the width of the output (100 columns for a file or a pipe), in ASCII if it is not UTF."""
    console = console or open_console()
    unicode = console.encoding.lower().startswith("utf")
    columns = min(MOST_COLUMNS, max(8, console.width - NUMBERS_WIDTH))
    console.print(utilisation_table(snapshot, measures, drift, kinds, columns=columns, unicode=unicode))
    if drift:
        console.print("drift: Jensen-Shannon divergence in bits from the frozen base on the same tokens; 0 none, 1 all")


def load_row(counts: NDArray[np.int64], *, columns: int = MOST_COLUMNS, unicode: bool = True) -> str:
    """One layer's load as a row of bars: blank for no rows, a quarter high at the mean, full from four times the mean.

    If there are more than `columns` experts, each bar is the mean of several.
    """
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    width = _experts_per_column(counts.size, columns)
    starts = np.arange(0, counts.size, width)
    load = np.add.reduceat(counts, starts) / np.diff(starts, append=counts.size)
    top = FULL_BLOCK * counts.mean()
    heights = (np.clip(load / top, 0.0, 1.0) * 8).round() if top else np.zeros(len(starts))
    visible = np.maximum(heights, load > 0).astype(int)  # blank is reserved for experts without a row
    return "".join(blocks[height] for height in visible)


def _experts_per_column(experts: int, columns: int) -> int:
    """The smallest number that fits; a divisor of the number of experts instead, if one is below twice that."""
    least = -(-experts // columns)
    return next((width for width in range(least, 2 * least) if experts % width == 0), least)
