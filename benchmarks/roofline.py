"""A roofline of what was measured: rate against operations a byte, under what the card's memory and products allow.

    python -m benchmarks.roofline benchmarks/results/moe_layer_h100.json docs/roofline.svg

Every row in the results of `benchmarks.moe_layer` is a point: operations of forward and input gradient, divided by the
minimum of bytes moved (every weight once in each direction, and each token's input, output and their gradients).
"""

import argparse
import json
import math
from pathlib import Path

from benchmarks.moe_layer import EXPERTS, HIDDEN, TOP_K, WIDTH

# Measured on one H100 80GB: bfloat16 product of 8192 x 8192 matrices, and a copy within its memory.
PEAK_TFLOPS, COPY_TB = 777.0, 2.975
SIZE, MARGIN = (720, 420), 60
X, Y = (30.0, 1500.0), (50.0, 1000.0)  # operations per byte, TFLOP/s; both axes are logarithmic
COLOURS = {"nextune": "#c0392b", "torch_grouped_mm": "#2c7fb8", "transformers_grouped_mm": "#7f8c8d"}


def intensity(tokens: int) -> float:
    """Operations per byte of frozen experts, for forward and input gradient."""
    weights = 2 * 2 * 3 * EXPERTS * HIDDEN * WIDTH
    rows = 2 * tokens * HIDDEN * 4
    return 12 * tokens * TOP_K * HIDDEN * WIDTH / (weights + rows)


def place(x: float, y: float) -> tuple[float, float]:
    def along(value: float, ends: tuple[float, float], length: float) -> float:
        return math.log(value / ends[0]) / math.log(ends[1] / ends[0]) * length

    width, height = (side - 2 * MARGIN for side in SIZE)
    return MARGIN + along(x, X, width), SIZE[1] - MARGIN - along(y, Y, height)


def line(points: list[tuple[float, float]], style: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    return f'<polyline points="{text}" fill="none" {style}/>'


def label(x: float, y: float, text: str, style: str = "", dx: float = 0, dy: float = 0) -> str:
    at = place(x, y)
    return f'<text x="{at[0] + dx:.1f}" y="{at[1] + dy:.1f}" font-size="12" {style}>{text}</text>'


def draw(rows: list[dict[str, float | str]], about: str) -> str:
    """The plot as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE[0]} {SIZE[1]}" font-family="sans-serif">',
        f'<rect width="{SIZE[0]}" height="{SIZE[1]}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">Routed experts, forward and input gradient: {about}</text>',
    ]
    for x in (50, 100, 200, 500, 1000):
        parts += [
            line([(x, Y[0]), (x, Y[1])], 'stroke="#eeeeee"'),
            label(x, Y[0], str(x), 'text-anchor="middle"', 0, 16),
        ]
    for y in (50, 100, 200, 400, 800):
        parts += [line([(X[0], y), (X[1], y)], 'stroke="#eeeeee"'), label(X[0], y, str(y), 'text-anchor="end"', -6, 4)]
    ridge = PEAK_TFLOPS / COPY_TB
    parts += [
        line([(X[0], X[0] * COPY_TB), (ridge, PEAK_TFLOPS), (X[1], PEAK_TFLOPS)], 'stroke="black" stroke-width="2"'),
        label(ridge, PEAK_TFLOPS, f"{PEAK_TFLOPS:.0f} TFLOP/s", "", 8, -6),
        label(X[0] * 1.1, X[0] * 1.1 * COPY_TB, f"{COPY_TB} TB/s", "", 6, 18),
        label(X[1], Y[0], "operations a byte", 'text-anchor="end"', 0, 34),
        label(X[0], Y[1], "TFLOP/s", "", -40, -10),
    ]
    for place_of_name, (name, colour) in enumerate(COLOURS.items()):
        points = sorted(
            (intensity(int(row["tokens"])), float(row["tflops"]), int(row["tokens"]))
            for row in rows
            if row["name"] == name and row["routing"] == "uniform"
        )
        parts.append(line([(x, y) for x, y, _ in points], f'stroke="{colour}" stroke-dasharray="4 3"'))
        for x, y, tokens in points:
            at = place(x, y)
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" fill="{colour}"/>')
            parts.append(label(x, y, f"{tokens:,}", f'fill="{colour}"', 8, 4))
        parts.append(label(X[0] * 1.1, Y[1] / 1.2, name, f'fill="{colour}"', 20, 18 * place_of_name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    about = f"{found['device']}, tokens beside each point"
    options.out.write_text(draw(found["rows"], about), encoding="utf-8")


if __name__ == "__main__":
    main()
