import io

import numpy as np
import pytest
import rich.console
from PIL import Image

from monitoring.charts import DEAD, LEFT, OCTAVES, TOP, cell_size, heatmap, heatmap_png, palette
from monitoring.console import Console, duration
from monitoring.health import Finding
from monitoring.routing import RoutingSnapshot, routing_drift, routing_measures, routing_record
from monitoring.sinks import Sinks
from monitoring.table import load_row, print_utilisation

TRAIN = {
    "kind": "train",
    "loss": 2.34567,
    "tokens": 4096,
    "tokens_per_second": 12345.6,
    "lr": 1e-4,
    "grad_norm": 0.5218,
    "balance_loss": 1.0123,
    "z_loss": None,
    "seconds": 0.3,
    "peak_bytes": 3 * 2**29,
}


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self):
        return self.now


def show(*events, terminal=False, width=200, steps=100):
    """What the sink prints for records, (seconds, record) pairs and snapshots."""
    clock = Clock()
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    sink = Console(steps=steps, console=console, clock=clock)
    for event in events:
        if isinstance(event, RoutingSnapshot):
            sink.routing(event, routing_record(event, routing_measures(event)))
            continue
        seconds, record = event if isinstance(event, tuple) else (0, event)
        clock.now += seconds
        sink.write(record)
    sink.close()
    return console.file.getvalue()


def even(layers, experts=32):
    return np.full((layers, experts), 100)


def test_a_line_says_everything_about_the_step():
    counts = even(12)
    counts[10, 7] = 1000
    text = show(
        {"kind": "start", "step": 0},
        RoutingSnapshot(10, tuple(range(12)), counts, 800),
        (20, TRAIN | {"step": 10}),
    )
    ratio = 1000 / counts[10].mean()
    assert text == (
        "step 10/100 | loss 2.3457 | 12,346 tokens/s | lr 1.00e-04 | grad norm 0.522 | balance loss 1.0123 | "
        f"worst load {ratio:.1f}x mean (layer 10) | 1.50 GiB | 3m 00s left\n"
    )


def test_time_left_counts_from_where_the_run_resumed():
    lines = show({"kind": "start", "step": 50}, (10, TRAIN | {"step": 60}), (30, TRAIN | {"step": 70})).splitlines()
    assert lines[0].endswith("40s left")  # 1 s a step
    assert lines[1].endswith("1m 00s left")  # 2 s a step


def test_time_left_is_not_guessed_before_a_second_arrival():
    assert "left" not in show(TRAIN | {"step": 10})


def test_other_records_are_one_line_each_and_markup_in_them_is_text():
    text = show(
        {"kind": "start", "step": 0},
        {"kind": "eval", "step": 20, "loss": 2.25, "tokens": 12345, "parts": [(1.0, 2)], "time": 1.0},
        {"kind": "checkpoint", "step": 20, "path": "runs/[bold]x/checkpoints/step-20"},
        {"kind": "checkpoint", "step": 40, "path": "checkpoints/step-40", "seconds": 0.3874, "blocked_seconds": 0.1184},
        {"kind": "checkpoint", "step": 60, "path": "checkpoints/step-60", "seconds": 83.2, "blocked_seconds": 9.96},
        {"kind": "action", "step": 61, "message": "SIGTERM: saved and stopped, resumable"},
        {"kind": "end", "step": 20},
    )
    assert text.splitlines() == [
        "step 20 | eval: loss 2.2500, tokens 12,345",
        "step 20 | runs/[bold]x/checkpoints/step-20 is written",
        "step 40 | checkpoints/step-40 is written, in 0.4s beside the training, which waited 0.1s for it",
        "step 60 | checkpoints/step-60 is written, in 1m 23s beside the training, which waited 10s for it",
        "step 61 | SIGTERM: saved and stopped, resumable",
    ]


def test_findings_are_shown_from_warn_upwards():
    found = [Finding(30, level, "drift_from_base", 7, f"[{level}] message") for level in ("info", "warn", "stop")]
    assert show(*(f.record() for f in found)).splitlines() == [
        "step 30 | WARN drift_from_base: [warn] message",
        "step 30 | STOP drift_from_base: [stop] message",
    ]


def test_many_layers_that_break_one_rule_are_two_lines_and_a_count():
    found = [Finding(30, "warn", "drift_from_base", layer, f"layer {layer}") for layer in range(48)]
    other = Finding(30, "alert", "drift_from_base", 5, "layer 5")
    assert show(*(f.record() for f in [*found, other]), TRAIN | {"step": 30}).splitlines()[:4] == [
        "step 30 | WARN drift_from_base: layer 0",
        "step 30 | WARN drift_from_base: layer 1",
        "step 30 | WARN drift_from_base: and 46 more layers, which metrics.jsonl names",
        "step 30 | ALERT drift_from_base: layer 5",
    ]


def test_a_pipe_gets_whole_lines_however_narrow():
    assert len(show(TRAIN | {"step": 1}, width=40).splitlines()) == 1


def test_a_terminal_gets_a_bar_that_ends_full_and_lines_above_it():
    text = show(
        {"kind": "start", "step": 0},
        TRAIN | {"step": 50},
        {"kind": "eval", "step": 50, "loss": 2.25},
        TRAIN | {"step": 100},
        {"kind": "end", "step": 100},
        terminal=True,
    )
    assert "100/100" in text
    assert "loss 2.3457" in text
    assert "step 50 | eval: loss 2.2500" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_a_console_that_fails_leaves_no_bar_behind():
    console = rich.console.Console(file=io.StringIO(), width=80, force_terminal=True)
    sink = Console(steps=10, console=console)
    sinks = Sinks([sink])
    sinks.write(TRAIN | {"step": 1})
    sinks.write(TRAIN | {"step": "two"})  # cannot be compared with a number
    assert console.file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (725, "12m 05s"), (12_000, "3h 20m"), (-1, "0s")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def table_of(snapshot, drift=None, kinds=None, width=100):
    console = rich.console.Console(file=io.StringIO(), width=width, highlight=False)
    print_utilisation(snapshot, routing_measures(snapshot), drift, kinds, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("experts", [32, 512])
def test_the_table_has_a_row_a_layer_in_numeric_order_within_100_columns(experts):
    counts = even(12, experts)
    counts[3] = 0
    counts[3, 0] = 100
    layers = tuple(sorted(range(12), key=str))
    snapshot = RoutingSnapshot(60, layers, counts, 4096)  # row 3 of the counts is layer 11
    drift = routing_drift(layers=layers, base_counts=even(12, experts), counts=counts, kept=np.ones(12))
    kinds = {layer: "attention" if layer % 4 == 3 else "DeltaNet" for layer in layers}
    title, head, *rows, note = table_of(snapshot, drift, kinds)
    assert "step 60, 4,096 tokens" in title
    assert head.split()[:6] == ["layer", "kind", "busiest", "effective", "MaxVio", "dead"]
    assert note.startswith("drift: ")
    assert [row.split()[0] for row in rows] == [str(layer) for layer in range(12)]
    assert max(map(len, (title, head, *rows, note))) <= 100
    assert "…" not in "".join(rows)
    assert rows[11].split()[1:8] == [
        "attention",
        "100.0%",
        "1.0",
        "of",
        str(experts),
        f"{experts - 1:.2f}",
        str(experts - 1),
    ]
    assert rows[2].split()[1:9] == [
        "DeltaNet",
        f"{1 / experts:.1%}",
        f"{experts:.1f}",
        "of",
        str(experts),
        "0.00",
        "0",
        "0.0000",
    ]


def test_the_table_needs_neither_kinds_nor_drift():
    lines = table_of(RoutingSnapshot(1, (0, 1), even(2), 800))
    assert lines[1].split() == ["layer", "busiest", "effective", "MaxVio", "dead", "load", "by", "expert"]
    assert len(lines) == 4


def test_an_ascii_terminal_gets_an_ascii_table():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    snapshot = RoutingSnapshot(1, (0, 1), even(2), 800)
    print_utilisation(snapshot, routing_measures(snapshot), console=rich.console.Console(file=file, width=100))
    file.flush()
    assert b"::::" in file.buffer.getvalue()


def test_bars_show_load_relative_to_the_mean():
    assert load_row(np.full(32, 7)) == "▂" * 32
    assert load_row(np.array([0, 1, 100, 400, 0, 0, 99, 200])) == " ▁▂█  ▂▄"
    assert load_row(np.zeros(8, dtype=np.int64)) == " " * 8
    assert load_row(np.array([0, 16, 0, 0, 0, 0, 0, 0]), unicode=False) == " @      "


@pytest.mark.parametrize(
    ("experts", "columns", "drawn"),
    [(32, 64, 32), (512, 64, 64), (512, 36, 32), (60, 36, 30), (61, 36, 31), (100, 64, 50)],
)
def test_experts_share_columns_evenly_where_they_can(experts, columns, drawn):
    counts = np.full(experts, 10)
    counts[0] = 0
    assert len(load_row(counts, columns=columns)) == drawn <= columns


def centre(image, snapshot, row, expert):
    across, down = cell_size(len(snapshot.layers), snapshot.experts)
    return image.getpixel((LEFT + expert * across + across // 2, TOP + row * down + down // 2))


@pytest.mark.parametrize("experts", [32, 512])
def test_the_heatmap_paints_load_relative_to_the_layers_mean(experts):
    counts = np.full((2, experts), 64)
    counts[1, :4] = (0, 8, 128, 64)
    counts[1, 4:] += np.resize([60, -60], experts - 4)  # leaves the mean near 64
    snapshot = RoutingSnapshot(5, (10, 9), counts[::-1], 1)  # out of order: the even layer is 9, the first row
    image = heatmap(snapshot).convert("RGB")
    assert image.width >= LEFT + 1024
    for expert in range(experts):
        assert centre(image, snapshot, 0, expert) == tuple(palette(np.array(0.5)))  # even: the middle of the scale
        relative = counts[1, expert] / counts[1].mean()
        position = (np.log2(relative) / OCTAVES + 1) / 2 if relative else None
        expected = DEAD if position is None else tuple(palette(np.clip(position, 0, 1)))
        assert centre(image, snapshot, 1, expert) == expected


def test_the_palette_grows_lighter_all_the_way():
    lightness = palette(np.linspace(0, 1, 64)).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()


def test_the_png_is_the_picture():
    snapshot = RoutingSnapshot(5, (0, 1), even(2), 1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(heatmap_png(snapshot)))), np.asarray(heatmap(snapshot)))
