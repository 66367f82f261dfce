"""The loop over a prepared job: every mode, optimizer and filter, and a run that goes on."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dpengine.mechanism import noise
from dpengine.mechanism.clipping import Flat
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.mechanism.private import Private
from dpengine.mechanism.sampling import PoissonSampler
from dpengine.run import folder as run_folder
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
from dpengine.training.state import Trainer, make_trainer

DRAWS, STEPS = 2, 3


def settings_of(data, training: TrainingSettings | None = None, **privacy) -> Settings:
    return Settings(
        data=DataSettings(str(data)),
        model=ModelSettings(rank=2, target_modules=("to_v",)),
        privacy=PrivacySettings(
            **{"epsilon": float("inf"), "delta": 1e-3, "draws_per_record": DRAWS}
            | {"num_steps": STEPS, "max_grad_norm": 0.01}
            | privacy
        ),
        training=training or TrainingSettings(),
        performance=PerformanceSettings(physical_batch_size=16),
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """One job for all modes: 24 records, the adapter as it was before training."""
    file = tmp_path_factory.mktemp("data") / "private.npz"
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    np.savez(file, images=images, labels=np.arange(24) % 10)
    return prepare(settings_of(file))


@pytest.fixture(autouse=True)
def initial_weights(request):
    """The module's job has its first weights back after each test."""
    if "job" not in request.fixturenames:
        yield
        return
    params = request.getfixturevalue("job").capture.parameters
    saved = [param.detach().clone() for param in params]
    yield
    with torch.no_grad():
        for param, old in zip(params, saved, strict=True):
            param.copy_(old)
            param.grad = None


def plan_of(settings: Settings, job: Job, noise_multiplier: float = 0.0) -> PrivacyPlan:
    """The plan without its calibration."""
    return dataclasses.replace(make_plan(settings.privacy, job), noise_multiplier=noise_multiplier)


def steps_of(job: Job, trainer: Trainer, ledger: Ledger, num_steps: int, stop=lambda: False):
    """The steps of the command, without its folder."""
    plan = ledger.plan
    sampler = PoissonSampler(
        len(job.records.reveal()),
        plan,
        num_steps=num_steps,
        physical_batch_size=job.physical_batch_size,
        reserve=lambda: ledger.reserve(trainer.optimizer.max_grad_norm),
        announce=job.capture.announcements.announce,
        unit_ids=job.records.reveal().unit_ids,
    )
    draws = plan.draws_per_record
    for _ in engine.steps(
        job, trainer.optimizer, sampler, draws_per_record=draws, interrupted=stop
    ):
        trainer.after_step()
        yield


def bounds(ledger: Ledger) -> list[float]:
    return [json.loads(line)["max_grad_norm"] for line in ledger.path.read_text().splitlines()[1:]]


def start(tmp_path, settings: Settings, job: Job, noise_multiplier: float = 0.0):
    plan = plan_of(settings, job, noise_multiplier)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan)
    return make_trainer(settings, plan, job.capture.parameters, job.loss_scale), ledger


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "automatic", "adaptive"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 2.0])
def test_every_clipping_mode_trains_and_keeps_its_bound(job, tmp_path, clipping, noise_multiplier):
    """All 24 records at rate 1, whose noised sum has at most norm 24 C, noise left out.

    With noise, P values of standard deviation σ C make a norm within a few of σ C √P.
    """
    settings = settings_of("unused", clipping=clipping)
    trainer, ledger = start(tmp_path, settings, job, noise_multiplier)
    optimizer, norms, clip = trainer.optimizer, [], [settings.privacy.max_grad_norm]

    def watched(noised):
        grads = torch.cat([param.grad.flatten() for param in noised.params])
        norms.append((float(grads.norm()) * noised.expected_batch_size, clip[-1]))
        clip.append(noised.max_grad_norm)
        for param in noised.params:
            param.grad.zero_()

    optimizer.attach_step_hook(watched)
    assert sum(1 for _ in steps_of(job, trainer, ledger, STEPS)) == len(norms) == STEPS
    n_values = sum(param.numel() for param in trainer.params)
    for norm, bound in norms:
        most = noise_multiplier * bound * (n_values**0.5 + 6)
        if clipping == "adaptive":
            most *= 1.2  # σ_sum: σ_b = 2 = σ here, so σ_sum / σ = (1 - 1/4)^(-1/2) = 1.155
        assert 0 < norm <= 24 * bound + most
        if noise_multiplier:
            assert norm > noise_multiplier * bound * (n_values**0.5 - 6) - 24 * bound
    assert bounds(ledger) == [bound for _, bound in norms]
    assert bounds(ledger)[0] == 0.01
    assert len(set(bounds(ledger))) == (STEPS if clipping == "adaptive" else 1)


@pytest.mark.parametrize("gradient_filter", ["none", "laplacian", "low-pass"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-bc", "lamb"])
def test_every_optimizer_and_filter_moves_every_tensor(job, tmp_path, optimizer, gradient_filter):
    training = TrainingSettings(optimizer=optimizer, gradient_filter=gradient_filter)
    trainer, ledger = start(tmp_path, settings_of("unused", training), job, 1.0)
    before = [param.detach().clone() for param in trainer.params]
    for _ in steps_of(job, trainer, ledger, 2):
        pass
    assert ledger.reserved == trainer.average.num_updates == 2
    for param, old in zip(trainer.params, before, strict=True):
        assert param.isfinite().all() and not torch.equal(param.detach(), old)


class Repeated:
    """Diffusion noise and timesteps that depend on the step alone, so that runs can be compared.

    Private draws are secret and never repeat; without noise they are the one difference.
    """

    def __init__(self, monkeypatch, job: Job) -> None:
        draw_rows, self.number = engine.draw_rows, 0

        def repeated(*args):
            rows = draw_rows(*args).reveal()
            generator = torch.Generator().manual_seed(self.number)
            self.number += 1
            normal = torch.randn(rows["latents"].shape, generator=generator)
            timesteps = torch.randint(1000, rows["times"].shape, generator=generator)
            return Private(rows | {"times": timesteps, "diffusion_noise": normal})

        monkeypatch.setattr(engine, "draw_rows", repeated)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw-bc"])
def test_an_adaptive_low_pass_run_goes_on_bit_by_bit(job, tmp_path, monkeypatch, optimizer):
    """Bound, filter, moments, schedule and average; the ledger's bounds are those of one run."""
    training = TrainingSettings(
        optimizer=optimizer,
        gradient_filter="low-pass",
        filter_strength=0.7,
        lr_schedule="cosine",
        momentum=0.9,
        ema_decay=0.8,
        learning_rate=0.05,
    )
    settings = settings_of("unused", training, clipping="adaptive", num_steps=6)
    first = [param.detach().clone() for param in job.capture.parameters]
    draws = Repeated(monkeypatch, job)
    noisy_mean = noise.noisy_mean  # the count of adaptive clipping is noised at any epsilon
    monkeypatch.setattr(noise, "noisy_mean", lambda total, _, *rest: noisy_mean(total, 0.0, *rest))
    (tmp_path / "whole").mkdir()
    whole, ledger = start(tmp_path / "whole", settings, job)
    for _ in steps_of(job, whole, ledger, 6):
        pass
    expected = [param.detach().clone() for param in (*whole.params, *whole.average.tensors)]
    expected_bounds = bounds(ledger)

    with torch.no_grad():
        for param, old in zip(job.capture.parameters, first, strict=True):
            param.copy_(old)
            param.grad = None
    draws.number = 0
    stopped, ledger = start(tmp_path, settings, job)
    for _ in steps_of(job, stopped, ledger, 3):
        pass
    stopped.save(tmp_path / "checkpoints", ledger)
    with torch.no_grad():
        for param in job.capture.parameters:
            param.zero_()
            param.grad = None
    resumed = make_trainer(settings, ledger.plan, job.capture.parameters)
    resumed.restore(tmp_path / "checkpoints", ledger)
    for _ in steps_of(job, resumed, ledger, ledger.remaining):
        pass
    got = [*resumed.params, *resumed.average.tensors]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert bounds(ledger) == expected_bounds
    assert len(set(expected_bounds)) == 6
    assert resumed.average.num_updates == 6


def test_an_interrupt_forgets_the_partial_sum_and_keeps_the_charge(job, tmp_path):
    """Batches of 16 and 8 records; stopped after the first of the second step."""
    trainer, ledger = start(tmp_path, settings_of("unused"), job)
    asked = []

    def interrupted() -> bool:
        asked.append(ledger.reserved)
        return len(asked) == 3

    assert sum(1 for _ in steps_of(job, trainer, ledger, STEPS, interrupted)) == 1
    assert asked == [1, 1, 2]
    assert ledger.reserved == 2 and trainer.average.num_updates == 1
    assert trainer.optimizer._answers is None
    assert sum(1 for _ in steps_of(job, trainer, ledger, ledger.remaining)) == 1


def test_the_loss_is_that_of_each_step_alone(job, tmp_path):
    """After two identical steps without momentum the second moved by its own sum, not by both."""
    training = TrainingSettings(momentum=0.0, lr_schedule="constant", learning_rate=1e-9)
    trainer, ledger = start(tmp_path, settings_of("unused", training), job)
    sizes = []
    clip_and_sum = Flat.clip_and_sum

    def watched(mode, grads, is_record, **kwargs):
        sizes.append(int(is_record.sum()))
        return clip_and_sum(mode, grads, is_record, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flat, "clip_and_sum", watched)
        for _ in steps_of(job, trainer, ledger, 2):
            assert trainer.optimizer._answers is None
    assert sizes == [16, 8, 16, 8]


def test_a_grouped_file_is_sampled_and_promised_by_unit(tmp_path):
    """Eight persons of three images each, one of whom has all classes; two images to a step."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    unit_ids = np.repeat(np.arange(8), 3)
    file = tmp_path / "grouped.npz"
    np.savez(file, images=images, labels=np.arange(24) % 10, unit_ids=unit_ids)
    settings = settings_of(file, rows_per_unit=2)
    job = prepare(settings)
    plan = make_plan(settings.privacy, job)
    assert (plan.unit, plan.rows_per_unit, plan.public_dataset_size) == ("unit", 2, 8)
    assert plan.expected_batch_size == 8
    assert job.capture.draws_per_record == 2 * DRAWS
    folder = run_folder.RunFolder(tmp_path / "run")
    ledger = run_folder.create(folder, settings, plan)
    trainer = make_trainer(settings, plan, job.capture.parameters)
    seen = []
    take = job.capture.take

    def watched():
        seen.append(take())
        return seen[-1]

    job.capture.take = watched
    assert sum(1 for _ in steps_of(job, trainer, ledger, 2)) == 2
    assert [batch.is_record.sum() for batch in seen] == [8, 8]
    assert all(batch.n_rows == 16 * 2 * DRAWS for batch in seen)
    assert json.loads(folder.ledger.read_text().splitlines()[0])["plan"]["unit"] == "unit"
