"""Audits of the real path, and of the same with a fault planted in it."""

import itertools

import numpy as np
import pytest
import torch

from dpengine import PrivacyPlan, audit, auditing
from dpengine.audit import AuditSettings
from dpengine.auditing.canaries import Canaries
from dpengine.mechanism import clipping, noise, sampling
from dpengine.mechanism.clipping import ClippedSum, Flat

CONFIDENCE = 1 - 1e-6
"""So that a bound of a right engine is above its claim in at most one test of a million."""

NOISY_MEAN, NORMALS, CLIP_AND_SUM = noise.noisy_mean, noise.normals, Flat.clip_and_sum


def found(runs=32, canaries=256, **settings) -> list[str]:
    settings = AuditSettings(
        runs=runs,
        canaries=canaries,
        confidence=CONFIDENCE,
        multi_step_runs=0,
        long_run_steps=0,
        **settings,
    )
    return audit.findings([attack() for attack in audit.attacks(settings)])


def said(sentences: list[str], what: str) -> bool:
    return any(what in sentence for sentence in sentences)


def poisson_plan(**changed) -> PrivacyPlan:
    fields = {
        "sampling_rate": 0.25,
        "noise_multiplier": 1.0,
        "num_steps": 16,
        "max_grad_norm": auditing.MAX_GRAD_NORM,
        "delta": 1e-5,
        "public_dataset_size": 64,
        "adjacency": "add-remove",
        "draws_per_record": 1,
        "trainable_parameters": 128,
    }
    return PrivacyPlan(**fields | changed)


def failed_of_many_steps(plan=None, n_runs=4) -> set[str]:
    plan = plan or poisson_plan()
    scores, releases = auditing.many_steps(plan, n_runs, "cpu")
    checks = auditing.check_releases(releases, plan.noise_multiplier)
    checks.append(auditing.check_rate(scores.entries, scores.chances, plan.sampling_rate))
    return {check.name for check in checks if not check.p_value >= 1e-6}


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_the_engine_keeps_what_it_claims(sigma):
    assert found(noise_multiplier=sigma) == []


def test_the_engine_keeps_what_it_claims_over_poisson_steps():
    assert failed_of_many_steps() == set()


def test_canaries_have_orthogonal_gradients_above_the_bound():
    canaries = Canaries(64).train()
    rows = canaries.rows(np.arange(64), 64)
    assert rows.count_nonzero() == 64
    assert (rows.norm(dim=1) >= auditing.MAX_GRAD_NORM).all()
    for j in (0, 17, 63):
        canaries(rows[j : j + 1]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in canaries.parameters()])
        assert torch.equal(gradient, rows[j])
        canaries.zero_grad()


def test_padding_holds_a_canary_that_would_show():
    rows = Canaries(64).rows(np.array([5]), 3)
    assert rows[0].nonzero().item() == 5
    assert (rows[1:, 0] >= auditing.MAX_GRAD_NORM).all()


def test_releases_are_sums_of_the_canaries_that_entered():
    """Next to no noise: each value is 1 where the canary is in, 0 elsewhere, in units of C."""
    plan = poisson_plan(noise_multiplier=1e-7)
    _, releases = auditing.many_steps(plan, 1, "cpu")
    assert releases.entered.any() and not releases.entered.all()
    # Float32 weights and the room of 2^-22 that clipping leaves.
    assert releases.residuals.abs().max() < 2e-6


def test_scores_are_the_log_likelihood_ratio_of_both_worlds():
    """Against the densities of a release, with and without the canary, in plain float64."""
    plan = poisson_plan(num_steps=3, noise_multiplier=0.8)
    scores, releases = auditing.many_steps(plan, 2, "cpu")
    x, q, sigma = releases.values.numpy().reshape(2, 3, -1), 0.25, 0.8
    density_in, density_out = (np.exp(-((x - b) ** 2) / (2 * sigma**2)) for b in (1, 0))
    expected = np.log(((1 - q) * density_out + q * density_in) / density_out).sum(1)
    assert np.allclose(scores.scores, expected)
    entered = releases.entered.numpy().reshape(2, 3, -1)
    assert not (entered & ~scores.is_in[:, None]).any()
    assert scores.entries == entered.sum()
    assert scores.chances == 3 * scores.is_in.sum()


def test_three_per_cent_too_little_noise(monkeypatch):
    def less(clipped_sum, noise_multiplier, *rest):
        return NOISY_MEAN(clipped_sum, 0.97 * noise_multiplier, *rest)

    monkeypatch.setattr(noise, "noisy_mean", less)
    assert said(found(72, 512), "size of the noise")


def test_clipping_three_per_cent_above_the_bound(monkeypatch):
    def loose(self, *args, **kwargs):
        return ClippedSum(1.03 * CLIP_AND_SUM(self, *args, **kwargs).values, self.sensitivity)

    monkeypatch.setattr(Flat, "clip_and_sum", loose)
    assert said(found(72, 512, noise_multiplier=0.4), "size of a clipped gradient")


def test_records_that_are_not_clipped(monkeypatch):
    def unclipped(self, grads, is_record, **kwargs):
        values = torch.cat([g[is_record].double().sum(0).flatten() for g in grads])
        return ClippedSum(values * kwargs["loss_scale"], self.sensitivity)

    monkeypatch.setattr(Flat, "clip_and_sum", unclipped)
    sentences = found()
    assert said(sentences, "size of a clipped gradient")
    assert said(sentences, "above the claimed")


def test_padding_that_counts(monkeypatch):
    def unmasked(self, grads, is_record, **kwargs):
        return CLIP_AND_SUM(self, grads, torch.ones_like(is_record), **kwargs)

    monkeypatch.setattr(Flat, "clip_and_sum", unmasked)
    assert said(found(), "noise in each coordinate")


@pytest.mark.parametrize(
    ("bare", "what"),
    [(slice(64), "size of the noise"), (slice(7, 8), "noise in each coordinate")],
    ids=["tensor", "coordinate"],
)
def test_a_part_of_the_sum_without_noise(monkeypatch, bare, what):
    def partial(clipped_sum, noise_multiplier, divisor, random):
        mean = NOISY_MEAN(clipped_sum, noise_multiplier, divisor, random)
        mean[bare] = clipped_sum.values[bare] / divisor
        return mean

    monkeypatch.setattr(noise, "noisy_mean", partial)
    assert said(found(), what)


def test_no_noise_at_all_refutes_the_claim(monkeypatch):
    monkeypatch.setattr(noise, "normals", lambda random, count: torch.zeros(count).double())
    sentences = found()
    assert said(sentences, "above the claimed")
    assert said(sentences, "noise used in two releases")


def test_noise_that_is_the_same_in_every_run(monkeypatch):
    used = {}

    def again(random, count):
        return used.setdefault(count, NORMALS(random, count))

    monkeypatch.setattr(noise, "normals", again)
    assert said(found(), "noise used in two releases")
    assert "noise used in two releases" in failed_of_many_steps()


def test_noise_that_two_coordinates_share(monkeypatch):
    def shared(random, count):
        return NORMALS(random, count // 2).repeat(2)

    monkeypatch.setattr(noise, "normals", shared)
    assert said(found(), "noise used at two coordinates")


def test_noise_that_ignores_the_bound(monkeypatch):
    """σ C² where C = 1/2: half the noise, which the attack itself finds."""

    def squared(clipped_sum, noise_multiplier, *rest):
        return NOISY_MEAN(clipped_sum, noise_multiplier * clipped_sum.sensitivity, *rest)

    monkeypatch.setattr(noise, "noisy_mean", squared)
    assert said(found(), "epsilon, Gaussian is at least")


def test_noise_divided_twice(monkeypatch):
    def divided(clipped_sum, noise_multiplier, divisor, random):
        noisy = NOISY_MEAN(clipped_sum, noise_multiplier, 1.0, random)
        return (clipped_sum.values + (noisy - clipped_sum.values) / divisor) / divisor

    monkeypatch.setattr(noise, "noisy_mean", divided)
    assert said(found(), "epsilon, Gaussian is at least")


def test_a_sampler_that_takes_records_more_often(monkeypatch):
    bernoulli = sampling.SecureRandom.bernoulli

    def often(self, probability, count):
        return bernoulli(self, probability if probability == 0.5 else probability * 1.4, count)

    monkeypatch.setattr(sampling.SecureRandom, "bernoulli", often)
    assert "sampling rate" in failed_of_many_steps()


def test_a_sum_that_forgets_its_first_physical_batch(monkeypatch):
    monkeypatch.setattr(clipping, "join", lambda left, right: right)
    assert "size of a clipped gradient" in failed_of_many_steps()


def test_a_record_that_enters_a_sum_twice(monkeypatch):
    cut = sampling.cut

    def doubled(indices, *rest):
        return cut(np.concatenate([indices, indices]), *rest)

    monkeypatch.setattr(sampling, "cut", doubled)
    assert "size of a clipped gradient" in failed_of_many_steps()


@pytest.mark.parametrize(
    ("share", "n_canaries", "n_steps"),
    [(0.03, 1024, 250), pytest.param(0.01, 4096, 512, marks=pytest.mark.slow)],
)
def test_a_step_that_adds_a_share_of_the_last_steps_noise(monkeypatch, share, n_canaries, n_steps):
    """Of n values the share moves the sum by share · √n standard errors: 15 and 14."""
    sizes = {"num_steps": n_steps, "trainable_parameters": n_canaries}
    plan = poisson_plan(sampling_rate=0.01, **sizes)
    assert failed_of_many_steps(plan, 1) == set()
    last = {}

    def carried(clipped_sum, noise_multiplier, divisor, random):
        mean = NOISY_MEAN(clipped_sum, noise_multiplier, divisor, random)
        fresh = mean - clipped_sum.values / divisor
        mean += share * last.get("noise", 0)
        last["noise"] = fresh
        return mean

    monkeypatch.setattr(noise, "noisy_mean", carried)
    assert "noise used again at any distance" in failed_of_many_steps(plan, 1)


def test_a_sampler_that_takes_records_two_in_a_thousand_too_often(monkeypatch):
    bernoulli, plan = sampling.SecureRandom.bernoulli, poisson_plan(sampling_rate=0.5)
    monkeypatch.setattr(
        sampling.SecureRandom, "bernoulli", lambda self, q, n: bernoulli(self, 1.002 * q, n)
    )
    for off in (True, False):
        entries, chances = auditing.toss(plan, 30_000_000)
        assert 30_000_000 <= chances < 31_100_000
        assert (auditing.check_rate(entries, chances, 0.5).p_value < 1e-6) == off
        monkeypatch.undo()


@pytest.mark.slow
def test_a_long_run_is_right_past_every_counter():
    """Ten thousand steps of one engine and one sampler, each with draws of its own."""
    plan = poisson_plan(sampling_rate=0.02, num_steps=10_000, trainable_parameters=64)
    assert failed_of_many_steps(plan, 1) == set()


@pytest.mark.slow
def test_nonces_that_repeat_after_4096_draws(monkeypatch):
    fresh = itertools.count

    class Wrapped:
        def __init__(self):
            self.numbers = fresh()

        def __next__(self):
            return next(self.numbers) % 4096

    monkeypatch.setattr(itertools, "count", Wrapped)
    plan = poisson_plan(sampling_rate=0.02, num_steps=5000, trainable_parameters=64)
    assert "noise used again at any distance" in failed_of_many_steps(plan, 1)
