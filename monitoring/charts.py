"""A picture of expert load: one row of cells a layer, one column an expert, colour by load relative to the mean."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from monitoring.routing import RoutingSnapshot

# Dark violet to yellow in even steps of lightness, so that the order survives print and colour blindness.
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
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

DEAD = (0, 0, 0)  # an expert without a row: off the scale, not its low end
OCTAVES = 3  # the scale ends at 1/8 and 8 times the mean
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
LEFT, TOP, BOTTOM, MARGIN = 40, 22, 34, 10  # pixels


def heatmap(snapshot: RoutingSnapshot) -> Image.Image:
    """The heat-map with layer numbers, expert numbers and the scale, about 1,100 pixels wide."""
    layers, experts = snapshot.counts.shape
    across, down = cell_size(layers, experts)
    cells = np.kron(load_colours(snapshot.counts), np.ones((down, across, 1), dtype=np.uint8))
    width, height = LEFT + max(across * experts, 360) + MARGIN, TOP + down * layers + BOTTOM
    image = Image.new("RGB", (width, height), BACKGROUND)
    image.paste(Image.fromarray(cells), (LEFT, TOP))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((LEFT, 4), f"load of {experts} experts, step {snapshot.step}", INK, font)
    every = -(-12 // down)  # label only as many rows as there is room for
    for row, layer in list(enumerate(snapshot.layers))[::every]:
        draw.text((LEFT - 6, TOP + row * down + down // 2), str(layer), INK, font, anchor="rm")
    _draw_scale(image, draw, font)
    return image


def cell_size(layers: int, experts: int) -> tuple[int, int]:
    """Pixels across and down of one expert's cell."""
    return max(2, 1024 // experts), min(24, max(8, 768 // layers))


def load_colours(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The colour of every cell, (layers, experts, 3): load over the layer's mean on a logarithmic scale."""
    mean = counts.mean(axis=1, keepdims=True)
    relative = np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)
    position = (np.log2(np.where(relative > 0, relative, 1.0)) / OCTAVES + 1) / 2
    colours = palette(np.clip(position, 0.0, 1.0))
    colours[counts == 0] = DEAD
    return colours


def palette(position: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours for positions from 0 (violet) to 1 (yellow), in one more axis."""
    stops = np.linspace(0.0, 1.0, len(PALETTE))
    return np.stack([np.interp(position, stops, channel).round() for channel in PALETTE.T], axis=-1).astype(np.uint8)


def _draw_scale(image: Image.Image, draw: ImageDraw.ImageDraw, font: Font) -> None:
    top, bar = image.height - BOTTOM + 10, 140
    strip = np.broadcast_to(palette(np.linspace(0.0, 1.0, bar)), (10, bar, 3))
    draw.rectangle((LEFT, top, LEFT + 9, top + 9), DEAD)
    draw.text((LEFT + 14, top + 5), "no row", INK, font, anchor="lm")
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (LEFT + 100, top))
    draw.text((LEFT + 95, top + 5), f"1/{2**OCTAVES}", INK, font, anchor="rm")
    draw.text((LEFT + 105 + bar, top + 5), f"{2**OCTAVES} times the layer's mean", INK, font, anchor="lm")


def heatmap_png(snapshot: RoutingSnapshot) -> bytes:
    buffer = io.BytesIO()
    heatmap(snapshot).save(buffer, format="PNG")
    return buffer.getvalue()
