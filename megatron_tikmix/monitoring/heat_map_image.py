"""An influence matrix as a bitmap, for TensorBoard's image panel."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_tikmix.monitoring.decision import Influence
from megatron_tikmix.monitoring.figure_style import INK
from megatron_tikmix.monitoring.formatting import shorten, signed
from megatron_tikmix.monitoring.heat_maps import DIVERGING, GREY, GREY_TEXT

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL_WIDTH, BARE_CELL_WIDTH, GAP, LETTERS = 64, 24, 2, 24
"""Pixels of a cell with a number, of one without, and between cells, before enlarging; characters
of a name."""

FEW_CELLS, ENLARGED = 400, 3
"""A matrix of so few cells has numbers in them, and is drawn so many times as large: TensorBoard
shrinks a picture to the width of its card by leaving out pixels, and with a thin stroke a + would
become a −."""


@dataclass(frozen=True)
class Grid:
    """Where the cells of a heat map are, in pixels."""

    left: int
    top: int
    cell_width: int
    cell_height: int
    gap: int
    numbers: bool

    def corner(self, d: int, v: int) -> tuple[int, int]:
        """Upper left of the cell of domain d and task v."""
        return self.left + v * self.cell_width, self.top + d * self.cell_height


def heat_map_image(matrix: Influence) -> tuple[NDArray[np.uint8], Grid]:
    """Domains down, tasks across, each task over its largest entry; grey is within noise.

    Returns:
        pixels, uint8 (height, width, 3); and where the cells are in them.
    """
    names = [shorten(name, LETTERS) for name in matrix.domains]
    tasks = [shorten(name, LETTERS) for name in matrix.tasks]
    D, V = len(names), len(tasks)
    numbers = D * V <= FEW_CELLS
    scale = ENLARGED if numbers else 1
    font = ImageFont.load_default(scale * (12 if numbers else 9))
    grid = Grid(
        left=int(max(map(font.getlength, names))) + 12 * scale,
        top=int(max(map(font.getlength, tasks))) + 12 * scale,
        cell_width=(CELL_WIDTH if numbers else BARE_CELL_WIDTH) * scale,
        cell_height=(22 if numbers else 12) * scale,
        gap=GAP * scale,
        numbers=numbers,
    )
    size = (grid.left + V * grid.cell_width, grid.top + D * grid.cell_height)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for v, task in enumerate(tasks):
        _upright(image, task, (grid.corner(0, v)[0], 0), (grid.cell_width, grid.top), font)
    for d, name in enumerate(names):
        middle = (grid.left - 6 * scale, grid.corner(d, 0)[1] + grid.cell_height / 2)
        draw.text(middle, name, fill=INK, font=font, anchor="rm")
    _cells(draw, matrix, grid, font)
    return np.asarray(image), grid


def _cells(draw: ImageDraw.ImageDraw, matrix: Influence, grid: Grid, font: Font) -> None:
    relative_VD, noise_VD = matrix.relative().values_VD, matrix.is_noise()
    for v, d in np.ndindex(relative_VD.shape):
        (x, y), value = grid.corner(d, v), float(relative_VD[v, d])
        box = (x, y, x + grid.cell_width - grid.gap, y + grid.cell_height - grid.gap)
        draw.rectangle(box, fill=GREY[0][1] if noise_VD[v, d] else colour(value))
        if grid.numbers and np.isfinite(value):
            ink = GREY_TEXT if noise_VD[v, d] else INK if abs(value) < 0.6 else "white"
            middle = (x + grid.cell_width / 2, y + grid.cell_height / 2)
            # The font that comes with Pillow has no minus sign, and sets signs against digits.
            number = signed(value).replace("\N{MINUS SIGN}", "-")
            number = f"{number[0]} {number[1:]}"
            draw.text(middle, number, fill=ink, font=font, anchor="mm", stroke_width=1)


def colour(value: float) -> tuple[int, int, int]:
    """Of a relative influence, −1 to 1: orange harms, blue helps."""
    places = [2 * place - 1 for place, _ in DIVERGING]
    channels = np.array([_rgb(name) for _, name in DIVERGING])
    r, g, b = (round(float(np.interp(value, places, channels[:, c]))) for c in range(3))
    return r, g, b


def _rgb(name: str) -> tuple[int, int, int]:
    r, g, b = (int(name[place : place + 2], 16) for place in (1, 3, 5))
    return r, g, b


def _upright(
    image: Image.Image,
    text: str,
    corner: tuple[int, int],
    size: tuple[int, int],
    font: Font,
) -> None:
    """Text that runs upwards, in the middle of a box."""
    width, height = size
    turned = Image.new("RGB", (height, width), "white")
    ImageDraw.Draw(turned).text((4, width / 2), text, fill=INK, font=font, anchor="lm")
    image.paste(turned.rotate(90, expand=True), corner)
