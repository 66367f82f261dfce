"""What is prepared before a run: a record alone, and public sizes."""

import numpy as np
import pytest
import torch

from dpengine.settings import DataSettings, PerformanceSettings, PrivacySettings, Settings
from dpengine.training.job import prepare


@pytest.fixture
def save(tmp_path):
    def save(n: int, seed: int) -> str:
        images = np.random.default_rng(seed).integers(0, 256, (n, 8, 8), np.uint8)
        images[0] = np.arange(64).reshape(8, 8)
        path = tmp_path / f"{n}-{seed}.npz"
        np.savez(path, images=images, labels=np.arange(n) % 10)
        return str(path)

    return save


def job(data: str, **changes):
    privacy = PrivacySettings(delta=1e-3, draws_per_record=1, **changes)
    performance = PerformanceSettings(max_memory="64GB")
    return prepare(Settings(data=DataSettings(data), privacy=privacy, performance=performance))


def test_a_record_is_the_same_beside_any_others(save):
    """No statistic of the data set, such as a scale of latents, is in what is trained on."""
    first, second = (job(save(n, seed)).records.reveal() for n, seed in ((24, 0), (17, 1)))
    assert torch.equal(first.images[0], second.images[0])
    assert not torch.equal(first.images[1], second.images[1])


def test_the_physical_batch_follows_the_public_size(save):
    """By the true size, which is private, it would be 24."""
    assert job(save(24, 0), public_dataset_size=40).physical_batch_size == 40
