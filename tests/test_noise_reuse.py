"""Two that go on from one checkpoint share no noise, and no file holds a key."""

import base64
import dataclasses
import struct

import numpy as np
import pytest
import torch

from dpengine import finetune
from dpengine.mechanism import noise, secure_random
from dpengine.mechanism.sampling import PoissonSampler
from dpengine.mechanism.secure_random import SecureRandom, chacha20_words
from dpengine.optim import optimizer
from dpengine.run.ledger import Ledger
from dpengine.settings import (
    DataSettings,
    ModelSettings,
    PerformanceSettings,
    PrivacySettings,
    Settings,
    TrainingSettings,
)
from dpengine.training import loop as engine
from dpengine.training.job import Job, prepare
from dpengine.training.planning import make_plan
from dpengine.training.state import make_trainer

NOISE_MULTIPLIER = 1.0


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    file = tmp_path_factory.mktemp("data") / "private.npz"
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    np.savez(file, images=images, labels=np.arange(24) % 10)
    return prepare(settings_of(file))


def settings_of(file) -> Settings:
    """Plain SGD at a constant rate, so that a release is the weights' change over the rate."""
    return Settings(
        data=DataSettings(str(file)),
        model=ModelSettings(rank=4),
        privacy=PrivacySettings(
            epsilon=float("inf"), num_steps=6, draws_per_record=1, sampling_rate=1.0
        ),
        training=TrainingSettings(momentum=0.0, lr_schedule="constant"),
        performance=PerformanceSettings(physical_batch_size=24, device="cpu"),
    )


def release_after(job: Job, ledger: Ledger, folder, learning_rate: float, monkeypatch):
    """Resume, do one step, and give the released mean as an observer computes it, and the sum.

    Both float64 [P]; the sum is what a real observer does not see.
    """
    sums = []

    def spy(clipped_sum, *args, mean=noise.noisy_mean):
        sums.append(clipped_sum.values.clone())
        return mean(clipped_sum, *args)

    trainer = make_trainer(settings_of("unused"), ledger.plan, job.capture.parameters)
    trainer.restore(folder, ledger)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    before = torch.cat([param.detach().flatten().double() for param in trainer.params])
    sampler = PoissonSampler(
        len(job.records.reveal()),
        ledger.plan,
        num_steps=1,
        physical_batch_size=24,
        reserve=ledger.reserve,
        announce=job.capture.announcements.announce,
    )
    with monkeypatch.context() as patch:
        patch.setattr(noise, "noisy_mean", spy)
        options = {"draws_per_record": 1, "interrupted": lambda: False}
        for _ in engine.steps(job, trainer.optimizer, sampler, **options):
            trainer.after_step()
    after = torch.cat([param.detach().flatten().double() for param in trainer.params])
    (clipped_sum,) = sums
    return (before - after) / learning_rate, clipped_sum, trainer


def attack(job: Job, tmp_path, monkeypatch) -> float:
    """Correlation of the noise in the releases of two resumes of one checkpoint."""
    settings = settings_of("unused")
    plan = make_plan(settings.privacy, job)
    plan = dataclasses.replace(plan, noise_multiplier=NOISE_MULTIPLIER)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    folder = tmp_path / "checkpoints"
    trainer = release_after(job, ledger, folder, 1.0, monkeypatch)[2]
    trainer.save(folder, ledger)
    noises = []
    for learning_rate in (1.0, 0.5):
        mean, clipped_sum, _ = release_after(job, ledger, folder, learning_rate, monkeypatch)
        noises.append(mean * plan.expected_batch_size - clipped_sum)
    stddev = NOISE_MULTIPLIER * plan.max_grad_norm
    for found in noises:  # it is the noise that was found, not a rounding error
        assert abs(found.std() / stddev - 1) < 4 / (2 * len(found)) ** 0.5 + 1e-3
    return float(torch.corrcoef(torch.stack(noises))[0, 1])


def test_two_resumes_of_one_checkpoint_share_no_noise(job, tmp_path, monkeypatch):
    """For independent noise the correlation is normal with standard deviation 1/√P."""
    number = sum(param.numel() for param in job.capture.parameters)
    assert abs(attack(job, tmp_path, monkeypatch)) < 4 / number**0.5


def test_the_attack_finds_noise_that_is_reused(job, tmp_path, monkeypatch):
    """With one key for all: what restoring a generator's state would be."""

    def same_key(self):
        SecureRandom._rekey(self)
        self._key = bytes(32)

    class Restored(SecureRandom):
        _rekey = same_key

    monkeypatch.setattr(optimizer, "SecureRandom", Restored)
    assert attack(job, tmp_path, monkeypatch) > 0.99


def test_no_file_holds_a_key_or_its_stream(arguments, run, monkeypatch):
    """Raw, as text, reversed or in words, of any stream of the run."""
    keys = []

    def rekey(self, fresh=SecureRandom._rekey):
        fresh(self)
        keys.append(self._key)

    monkeypatch.setattr(SecureRandom, "_rekey", rekey)
    assert finetune.main(arguments) == 0
    assert len(keys) >= 3
    secrets = set()
    for key in keys:
        numbers = [int.from_bytes(key, order) for order in ("little", "big")]
        texts = [key.hex(), ", ".join(map(str, struct.unpack("<8I", key))), *map(str, numbers)]
        stream = [chacha20_words(key, struct.pack("<QI", n, 0), 0, 2).tobytes() for n in range(4)]
        secrets |= {key[:16], key[16:], key[::-1], base64.b64encode(key), *stream}
        secrets |= {text.encode() for text in texts}
    files = [file for file in run.path.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        assert not any(secret in content for secret in secrets), file
    assert secure_random.SecureRandom._rekey is rekey
