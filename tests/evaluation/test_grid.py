"""The picture: a row for each class, one panel above the other."""

import numpy as np
from PIL import Image

from dpengine.evaluation import grid as preview


def test_panels_and_rows_are_where_they_should_be(tmp_path):
    """Black above, white below; in the lower panel class 1 alone is grey."""
    labels = np.arange(8) % 2
    lower = np.where(labels == 1, 128, 255).astype(np.uint8)[:, None, None]
    panels = {
        "above": np.zeros((8, 8, 8), np.uint8),
        "below": np.broadcast_to(lower, (8, 8, 8)),
    }
    preview.save_grid(tmp_path / "grid.png", ["a", "b"], panels)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    upper, lower = np.array_split(pixels, 2)
    grey_rows = np.flatnonzero((abs(lower - 128) < 3).sum(1) > 100)
    white_rows = np.flatnonzero((lower[: grey_rows[0]] == 255).sum(1) > 100)
    assert (upper == 0).sum() > 10_000
    assert not (abs(upper - 128) < 3).sum() > 1000
    assert len(grey_rows) > 20
    assert len(white_rows) > 20


def test_colour_images_are_drawn_in_colour(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[..., 0] = 255
    preview.save_grid(tmp_path / "grid.png", ["a", "b"], {"red": images})
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert (pixels == [255, 0, 0]).all(-1).sum() > 1000
