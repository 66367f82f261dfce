"""Accuracy of a classifier trained on synthetic digits."""

import numpy as np
import pytest

from dpengine.data import records as data
from dpengine.evaluation.scores import synthetic_accuracy


def test_real_training_digits_score_as_a_good_classifier_does():
    """scikit-learn's own SVC on the same split errs on one image in a hundred."""
    train = data.load("digits", [str(digit) for digit in range(10)], 1, 8)
    images = ((train.images[:, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    assert synthetic_accuracy(images, train.labels.numpy()) > 0.98


def test_images_without_content_score_as_chance():
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8)
    accuracy = synthetic_accuracy(images, np.arange(500) % 10)
    assert accuracy < 0.3


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 8, 8\]"):
        synthetic_accuracy(np.zeros((10, 28, 28), np.uint8), np.arange(10))
