"""An influence matrix as a bitmap, for TensorBoard's image panel."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_tikmix.monitoring.decision import Influence
from megatron_tikmix.monitoring.figure_style import INK
from megatron_tikmix.monitoring.formatting import shorten, signed
from megatron_tikmix.monitoring.heat_maps import DIVERGING, GREY, GREY_TEXT

CELL_WIDTH, GAP, LETTERS, FEW_DOMAINS = 64, 2, 24, 40
"""Pixels, pixels, and characters of a name; above so many domains, rows are narrow."""


def cell_height(domains: int) -> int:
    """Pixels of a row: room for a number, or for a name alone where domains are many."""
    return 22 if domains <= FEW_DOMAINS else 12


def heat_map_image(matrix: Influence) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Domains down, tasks across, each task over its largest entry; grey is within noise.

    Returns:
        pixels, uint8 (height, width, 3); and where the first cell begins, (x, y).
    """
    height = cell_height(len(matrix.domains))
    size = 12 if height > 12 else 9
    font = ImageFont.load_default(size)
    names = [shorten(name, LETTERS) for name in matrix.domains]
    tasks = [shorten(name, LETTERS) for name in matrix.tasks]
    left = int(max(map(font.getlength, names))) + 12
    top = int(max(map(font.getlength, tasks))) + 12
    D, V = len(names), len(tasks)
    image = Image.new("RGB", (left + V * CELL_WIDTH, top + D * height), "white")
    draw = ImageDraw.Draw(image)
    relative_VD, noise_VD = matrix.relative().values_VD, matrix.is_noise()
    for v, task in enumerate(tasks):
        _upright(image, task, (left + v * CELL_WIDTH, 0), (CELL_WIDTH, top), font)
        for d in range(D):
            x, y, value = left + v * CELL_WIDTH, top + d * height, float(relative_VD[v, d])
            box = (x, y, x + CELL_WIDTH - GAP, y + height - GAP)
            draw.rectangle(box, fill=GREY[0][1] if noise_VD[v, d] else colour(value))
            if height > 12 and np.isfinite(value):
                faint = GREY_TEXT if noise_VD[v, d] else INK if abs(value) < 0.6 else "white"
                middle = (x + CELL_WIDTH / 2, y + height / 2)
                # The font that comes with Pillow has no minus sign.
                number = signed(value).replace("\N{MINUS SIGN}", "-")
                draw.text(middle, number, fill=faint, font=font, anchor="mm")
    for d, name in enumerate(names):
        middle = (left - 6, top + d * height + height / 2)
        draw.text(middle, name, fill=INK, font=font, anchor="rm")
    return np.asarray(image), (left, top)


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
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Text that runs upwards, in the middle of a box."""
    width, height = size
    turned = Image.new("RGB", (height, width), "white")
    ImageDraw.Draw(turned).text((4, width / 2), text, fill=INK, font=font, anchor="lm")
    image.paste(turned.rotate(90, expand=True), corner)
