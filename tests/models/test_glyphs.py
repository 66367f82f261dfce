"""Rendered digits: repeatable, in range, balanced; the preprocessing against hand-made bitmaps."""

import pytest
import torch

from dpengine.models.glyphs import block_counts, centred, glyphs


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


def centre_of_mass(images):
    at = torch.arange(images.shape[-1]) + 0.5
    mass = images.sum((2, 3))
    return (images.sum(3) @ at / mass).item(), (images.sum(2) @ at / mass).item()


def test_the_longer_side_becomes_the_box_and_the_other_keeps_its_share():
    ink = torch.zeros(1, 64, 64)
    ink[0, 3:35, 40:48] = 1  # 32 x 8 becomes 20 x 5
    image = centred(ink)
    assert image.shape == (1, 1, 28, 28)
    assert image.sum() == pytest.approx(100, abs=4) and image.max() == 1
    assert (image.sum(3) > 0.5).sum() == 20 and centre_of_mass(image) == pytest.approx((14, 14))


def test_the_centre_of_mass_is_in_the_middle_not_that_of_the_box():
    ink = torch.zeros(1, 64, 64)
    ink[0, 10:50, 10:18] = 1  # a tall bar with a foot to the right
    ink[0, 42:50, 10:50] = 1
    image = centred(ink)
    assert centre_of_mass(image) == pytest.approx((14, 14), abs=0.15)
    rows = image.sum(3).flatten().nonzero()
    assert (rows.min() + rows.max() + 1).item() / 2 < 13  # the box itself lies higher


def test_no_ink_is_centred_as_nothing():
    assert centred(torch.zeros(2, 64, 64)).sum() == 0
