"""Heat-map of expert load: one row of cells a layer, one column an expert, colour by load relative to the mean."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from monitoring.routing import RoutingSnapshot

# Dark violet to yellow in equal steps of lightness, readable in print and for the colour-blind.
PALETTE = np.array(
    [
        (68, 1, 84),
        (72, 36, 117),
        (65, 68, 135),
        (53, 95, 141),
        (42, 120, 142),
        (33, 145, 140),
        (34, 168, 132),
        (68, 191, 112),
        (122, 209, 81),
        (189, 223, 38),
        (253, 231, 37),
    ],
    dtype=np.float64,
)

DEAD = (0, 0, 0)  # an expert that received no row; not part of the scale
OCTAVES = 3  # the scale extends from 1/8 to 8 times the mean
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
LEFT, TOP, BOTTOM, MARGIN = 40, 22, 34, 10  # pixels
BAR = 140  # pixels; length of the colour scale

# An image of palette indices is encoded six times faster than one of colours. The palette: DEAD, then the scale, then
# shades from INK to BACKGROUND for text.
SCALE, SHADES = 239, 16


def heatmap(snapshot: RoutingSnapshot) -> Image.Image:
    """The heat-map with layer numbers, expert numbers and the scale, about 1,100 pixels wide."""
    layers, experts = snapshot.counts.shape
    across, down = cell_size(layers, experts)
    text = _text(snapshot, LEFT + max(across * experts, 360) + MARGIN, TOP + down * layers + BOTTOM, down)
    pixels = 1 + SCALE + (np.asarray(text) // (256 // SHADES))
    cells = load_levels(snapshot.counts).repeat(down, axis=0).repeat(across, axis=1)
    pixels[TOP : TOP + cells.shape[0], LEFT : LEFT + cells.shape[1]] = cells
    scale = slice(len(pixels) - BOTTOM + 10, len(pixels) - BOTTOM + 20)
    pixels[scale, LEFT : LEFT + 10] = 0
    pixels[scale, LEFT + 100 : LEFT + 100 + BAR] = 1 + np.linspace(0, SCALE - 1, BAR).round()
    image = Image.fromarray(pixels.astype(np.uint8), mode="P")
    image.putpalette(_colours().tobytes())
    return image


def _text(snapshot: RoutingSnapshot, width: int, height: int, down: int) -> Image.Image:
    """All text, black on white: the title, the layer numbers, the ends of the scale."""
    image = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((LEFT, 4), f"load of {snapshot.experts} experts, step {snapshot.step}", 0, font)
    every = -(-12 // down)  # label only as many rows as fit
    for row, layer in list(enumerate(snapshot.layers))[::every]:
        draw.text((LEFT - 6, TOP + row * down + down // 2), str(layer), 0, font, anchor="rm")
    middle = height - BOTTOM + 15
    draw.text((LEFT + 14, middle), "no row", 0, font, anchor="lm")
    draw.text((LEFT + 95, middle), f"1/{2**OCTAVES}", 0, font, anchor="rm")
    draw.text((LEFT + 105 + BAR, middle), f"{2**OCTAVES} times the layer's mean", 0, font, anchor="lm")
    return image


def cell_size(layers: int, experts: int) -> tuple[int, int]:
    """Width and height in pixels of one expert's cell."""
    return max(2, 1024 // experts), min(24, max(8, 768 // layers))


def load_levels(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Palette index of every cell, (layers, experts): 0 for no row, else by load relative to the layer's mean."""
    mean = counts.mean(axis=1, keepdims=True)
    relative = np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)
    position = (np.log2(np.where(relative > 0, relative, 1.0)) / OCTAVES + 1) / 2
    return np.where(counts == 0, 0, 1 + _level(np.clip(position, 0.0, 1.0))).astype(np.uint8)


def palette(position: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours for positions from 0 (violet) to 1 (yellow); RGB is the last axis of the result."""
    stops, levels = np.linspace(0.0, 1.0, len(PALETTE)), _level(position) / (SCALE - 1)
    return np.stack([np.interp(levels, stops, channel).round() for channel in PALETTE.T], axis=-1).astype(np.uint8)


def _level(position: NDArray[np.float64]) -> NDArray[np.int64]:
    """The nearest level of the scale, counted from 0."""
    return np.asarray(position * (SCALE - 1)).round().astype(np.int64)


def _colours() -> NDArray[np.uint8]:
    """The palette, (256, 3)."""
    shades = np.linspace(INK, BACKGROUND, SHADES).round().astype(np.uint8)
    return np.concatenate((np.array([DEAD], np.uint8), palette(np.linspace(0.0, 1.0, SCALE)), shades))


def heatmap_png(snapshot: RoutingSnapshot) -> bytes:
    buffer = io.BytesIO()
    heatmap(snapshot).save(buffer, format="PNG")
    return buffer.getvalue()
