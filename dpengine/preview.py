"""A picture of what two models draw for each class."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from . import durable


def save_grid(file: Path, class_names: list[str], panels: dict[str, np.ndarray]) -> None:
    """Write a PNG with one titled panel above the other, and in each a row of images per class.

    panels: title -> uint8 [columns * classes, H, W] or [..., C], ordered as ``even_labels``.
    """
    num_classes = len(class_names)
    grids = {title: _tile(images, num_classes) for title, images in panels.items()}
    height, width = next(iter(grids.values())).shape[:2]
    figure_width = 8.0
    panel_height = figure_width * height / width
    figure_height = len(panels) * (panel_height + 0.3)
    figure = Figure(figsize=(figure_width, figure_height), layout="constrained")
    for axes, (title, grid) in zip(
        figure.subplots(len(panels), squeeze=False).flat, grids.items(), strict=True
    ):
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=11)
        row = height / num_classes
        axes.set_yticks([(i + 0.5) * row - 0.5 for i in range(num_classes)], class_names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    durable.write(file, content.getvalue())


def _tile(images: np.ndarray, num_classes: int) -> np.ndarray:
    # A margin of an eighth keeps neighbours apart.
    margin = max(1, images.shape[1] // 8)
    padding = [(0, 0), (0, margin), (0, margin)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, padding)
    columns = [
        np.concatenate(padded[i : i + num_classes]) for i in range(0, len(images), num_classes)
    ]
    return np.concatenate(columns, axis=1)
