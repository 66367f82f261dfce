"""Rendered digits: repeatable, in range, balanced; the preprocessing against hand-made bitmaps."""

import pytest
import torch

from dpengine.models.glyphs import block_counts, glyphs


def draw(count: int, seed: int = 0):
    return glyphs(count, torch.Generator().manual_seed(seed))


def test_a_seed_fixes_the_glyphs():
    images, labels = draw(50)
    again, labels_again = draw(50)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(images, draw(50, seed=1)[0])


def test_values_are_ink_counts_scaled_to_one():
    images, labels = draw(200)
    assert images.shape == (200, 1, 8, 8)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    counts = (images + 1) * 8
    assert torch.equal(counts, counts.round())
    assert counts.min() == 0 and counts.max() == 16


def test_classes_are_balanced():
    _, labels = draw(205)
    assert labels.bincount(minlength=10).tolist() == [21] * 5 + [20] * 5


def test_every_glyph_fills_the_height():
    images, _ = draw(500)
    assert (images.amax(3) > -1)[:, 0, [0, -1]].all()


def test_block_counts_centre_and_scale_the_ink():
    ink = torch.zeros(1, 20, 30)
    ink[0, 3:11, 20:22] = 1
    counts = block_counts(ink)
    # The bitmap's four corner pixels are interpolated below one half.
    assert (counts[0, 0, :, 3:5] >= 15).all()
    assert (counts[0, 0, :, [0, 1, 2, 5, 6, 7]] == 0).all()


def test_an_empty_image_counts_to_zero():
    assert block_counts(torch.zeros(1, 28, 28)).sum() == 0


def test_no_glyphs_are_refused():
    with pytest.raises(ValueError, match="count"):
        draw(0)
