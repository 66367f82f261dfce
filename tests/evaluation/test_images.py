"""Images of released weights: reproducible, and in batches that fit."""

import numpy as np
import torch

from dpengine.evaluation import images as images_of
from dpengine.evaluation.images import load_alone


def test_the_seed_decides_the_images():
    pipeline, labels = load_alone("default"), torch.arange(10)
    first, again, other = (
        images_of.draw_images(pipeline, labels, sampler_steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_do_not_repeat_from_one_batch_to_the_next(monkeypatch):
    monkeypatch.setattr(images_of, "_BATCH", 10)
    labels = images_of.even_labels(20, 10)
    images = images_of.draw_images(load_alone("default"), labels, sampler_steps=2, seed=0)
    assert not np.array_equal(images[:10], images[10:])


def test_large_images_are_drawn_in_smaller_batches(monkeypatch):
    """Memory is bounded by values, not by images: a batch of 250 at 512 x 512 has gigabytes."""
    sizes = []

    class Large:
        image_channels, image_size, texts = 3, 512, "abcde"
        denoiser = torch.nn.Identity()

        def draw(self, texts, *_):
            sizes.append(len(texts))
            return torch.zeros(len(texts), 3, 2, 2)

    images = images_of.draw_images(Large(), torch.arange(5), sampler_steps=1, seed=0)
    assert images.shape == (5, 2, 2, 3)
    assert sizes == [1] * 5
