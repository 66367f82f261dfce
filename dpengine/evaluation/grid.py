"""A picture of what two models draw for each class, on at most a page."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..run import durable

_WIDTH, _HEIGHT = 1700, 1400
"""Pixels of a panel at most, unless a single image is larger."""
_COLUMNS = 20
_SMALLEST = 48
"""Pixels of an image's side at least: smaller images are shown enlarged, none is shrunk."""
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_TEXT = 15


def fit(size: int, num_classes: int) -> tuple[int, list[int]]:
    """How many columns fit, and the numbers of the classes that have a row, evenly chosen."""
    cell = _cell(size)
    columns = min(_COLUMNS, max(1, _WIDTH // cell))
    rows = min(num_classes, max(1, _HEIGHT // cell))
    return columns, [i * num_classes // rows for i in range(rows)]


def save_grid(file: Path, class_names: list[str], panels: dict[str, np.ndarray]) -> None:
    """Write a PNG with one titled panel above the other, and in each a row of images per class.

    panels: title -> uint8 [columns * classes, H, W] or [..., C], ordered as ``even_labels``.
    """
    grids = {title: _tile(images, len(class_names)) for title, images in panels.items()}
    font = ImageFont.truetype(_FONT, _TEXT)
    # Names are texts of others: a line each, and no wider than a sixth of the picture.
    names = [_short("".join(c if c.isprintable() else "?" for c in name)) for name in class_names]
    left = max(int(font.getlength(name)) for name in names) + 12
    height, width = next(iter(grids.values())).shape[:2]
    title_height = 2 * _TEXT
    page = Image.new("RGB", (left + width, len(grids) * (height + title_height)), "white")
    draw = ImageDraw.Draw(page)
    row = height // len(names)
    for number, (title, grid) in enumerate(grids.items()):
        top = number * (height + title_height) + title_height
        draw.text((left + width // 2, top - title_height // 2), title, "black", font, anchor="mm")
        page.paste(Image.fromarray(grid).convert("RGB"), (left, top))
        for i, name in enumerate(names):
            middle = top + i * row + row // 2
            draw.text((left - 8, middle), name, "black", font, anchor="rm")
    content = io.BytesIO()
    page.save(content, format="png")
    durable.write(file, content.getvalue())


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _enlarged(size: int) -> int:
    return max(1, -(-_SMALLEST // size))


def _margin(size: int) -> int:
    """Keeps neighbours apart."""
    return max(1, size * _enlarged(size) // 12)


def _cell(size: int) -> int:
    return size * _enlarged(size) + _margin(size)


def _tile(images: np.ndarray, num_classes: int) -> np.ndarray:
    """One panel, on white: uint8 [rows * cell, columns * cell] or [..., C]."""
    size = images.shape[1]
    by = _enlarged(size)
    large = images.repeat(by, axis=1).repeat(by, axis=2)
    margin = _margin(size)
    padding = [(0, 0), (0, margin), (0, margin)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(large, padding, constant_values=255)
    columns = [
        np.concatenate(padded[i : i + num_classes]) for i in range(0, len(images), num_classes)
    ]
    return np.concatenate(columns, axis=1)
