"""The Gaussian mechanism: noise of exactly the promised scale, fresh at every call."""

import math
import os

import pytest
import torch
from scipy import stats

from dpengine.kernels import ops
from dpengine.mechanism import noise as mechanism
from dpengine.mechanism.clipping import ClippedSum, empty_sum
from dpengine.mechanism.noise import grid_step, noisy_mean
from dpengine.mechanism.secure_random import SecureRandom

FALSE_ALARM = 1e-9
N_VALUES = 200_007


def zeros(sensitivity=0.7, n_values=N_VALUES):
    return empty_sum(n_values, sensitivity, torch.device("cpu"))


def add_noise(clipped_sum, noise_multiplier, random):
    return noisy_mean(clipped_sum, noise_multiplier, 1.0, random)


@pytest.fixture
def fine_grid(monkeypatch):
    """A grid so fine that noise is told apart by its values."""
    monkeypatch.setattr(mechanism, "grid_step", lambda noise_stddev: 2.0**-40)


def has_scale(noise, stddev):
    """Chi-square test of Σ (noise / stddev)²; rejects the true scale once in 1e9 times."""
    chi2 = stats.chi2(noise.numel())
    statistic = (noise / stddev).square().sum().item()
    return 2 * min(chi2.cdf(statistic), chi2.sf(statistic)) > FALSE_ALARM


@pytest.mark.parametrize("noise_multiplier", [0.4, 1.0, 13.0], ids="sigma={}".format)
@pytest.mark.parametrize("sensitivity", [1e-3, 0.7, 5.0], ids="C={}".format)
def test_the_scale_is_multiplier_times_sensitivity_and_not_three_per_cent_off(
    sensitivity, noise_multiplier
):
    noise = add_noise(zeros(sensitivity), noise_multiplier, SecureRandom())
    stddev = noise_multiplier * sensitivity
    # 200,007 draws fix the scale to 0.16 %: 3 % is 19 standard deviations.
    assert has_scale(noise, stddev)
    assert not has_scale(noise, 0.97 * stddev)
    assert not has_scale(noise, 1.03 * stddev)


def test_every_part_is_noised_with_mean_zero_and_normal_law():
    for noise in add_noise(zeros(2.0), 3.0, SecureRandom()).split(50_000)[:4]:
        z = noise.numpy() / 6.0
        assert has_scale(noise, 6.0)
        assert 2 * stats.norm.sf(abs(z.mean()) * math.sqrt(z.size)) > FALSE_ALARM
        assert stats.kstest(z, "norm").pvalue > FALSE_ALARM


def test_the_noise_is_added_to_the_sum_and_both_are_divided():
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(N_VALUES, dtype=torch.float64, generator=generator) * 1e9
    noisy = noisy_mean(ClippedSum(total, 1.0), 2.0, 64.0, SecureRandom())
    assert noisy.shape == total.shape and noisy.dtype == torch.float64
    noise = 64 * noisy - total
    assert has_scale(noise, 2.0) and noise.abs().max() < 2.0 * 10


def test_no_noise_value_occurs_twice_in_a_call_or_in_two(fine_grid):
    random = SecureRandom()
    values = torch.cat([add_noise(zeros(), 1.0, random) for _ in range(2)])
    assert len(values.unique()) == len(values)


def test_the_noise_of_two_halves_and_of_two_calls_is_uncorrelated():
    random, silent = SecureRandom(), zeros(1.0, 200_000)
    draws = torch.cat([add_noise(silent, 1.0, random).view(2, -1) for _ in range(2)])
    r = torch.corrcoef(draws) - torch.eye(4)
    assert 6 * 2 * stats.norm.sf(r.abs().max().item() * math.sqrt(100_000)) > FALSE_ALARM


def test_a_seed_does_not_repeat_the_noise(fine_grid):
    def draw():
        torch.manual_seed(0)
        return add_noise(zeros(), 1.0, SecureRandom())

    state = torch.get_rng_state()
    first, second = draw(), draw()
    torch.set_rng_state(state)
    assert not torch.isin(first, second).any()


def test_the_sum_itself_is_not_changed():
    silent = zeros()
    add_noise(silent, 1.0, SecureRandom())
    assert (silent.values == 0).all()


def test_multiplier_zero_adds_nothing():
    total = torch.arange(3.0, dtype=torch.float64)
    noisy = noisy_mean(ClippedSum(total, 1.0), 0.0, 4.0, SecureRandom())
    assert torch.equal(noisy, total / 4)


def test_the_words_and_normals_are_those_that_a_gpu_would_draw(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    total = torch.randn(1001, dtype=torch.float64)
    ours = noisy_mean(ClippedSum(total, 2.0), 3.0, 5.0, SecureRandom())
    stream = torch.from_numpy(SecureRandom().stream())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = grid_step(6.0)
    for impl in ("reference", "triton"):
        theirs = ops.add_noise(
            total.to(device), stream.to(device), noise_stddev=6.0, divisor=1.0, impl=impl
        )
        assert torch.equal(ours, (theirs.cpu() / step).round() * step / 5.0)


@pytest.mark.parametrize("noise_stddev", [1e-9, 0.3, 1.0, 700.0])
def test_a_noised_sum_lies_on_a_public_grid_whatever_the_sum(noise_stddev):
    """Else the lattice on which float64 has a sum would tell it apart (Mironov, CCS 2012)."""
    step = grid_step(noise_stddev)
    assert math.frexp(step)[0] == 0.5 and 2**-9 <= step / noise_stddev <= 2**-8
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(5_000, dtype=torch.float64, generator=generator) * noise_stddev * 1e3
    noisy = noisy_mean(ClippedSum(total, noise_stddev), 1.0, 1.0, SecureRandom())
    assert torch.equal(noisy / step, (noisy / step).round())
    assert has_scale(noisy - total, noise_stddev)


def test_no_release_proves_that_a_record_is_absent():
    """With 0 as the sum, float64 noise has bits that it cannot have beside 1."""
    releases = {}
    for total in (0.0, 1.0):
        values = torch.full((20_000,), total, dtype=torch.float64)
        releases[total] = noisy_mean(ClippedSum(values, 1.0), 0.5, 1.0, SecureRandom())
    beside_one = releases[0.0] - 1.0  # the noise that would have made the same release of 1
    assert torch.equal(beside_one + 1.0, releases[0.0])
    for values in releases.values():
        assert torch.equal(values * 2.0**12, (values * 2.0**12).round())


def test_the_mean_of_a_huge_sum_keeps_all_the_noise():
    values = torch.full((N_VALUES,), 2.0**30 + 0.123, dtype=torch.float64)
    noisy = noisy_mean(ClippedSum(values, 1.0), 1.0, 1.0, SecureRandom())
    assert has_scale(noisy - values, 1.0)


@pytest.mark.parametrize("divisor", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_a_divisor_that_is_not_positive_is_refused(divisor):
    with pytest.raises(ValueError, match="divisor"):
        noisy_mean(zeros(), 1.0, divisor, SecureRandom())


@pytest.mark.parametrize("noise_multiplier", [-1e-9, -1.0, math.nan], ids=str)
def test_a_multiplier_below_zero_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise_multiplier"):
        add_noise(zeros(), noise_multiplier, SecureRandom())


def test_every_value_of_a_large_sum_is_noised():
    """SD 1.5 at rank 4 has 797,184 values, SDXL 5,806,080."""
    noisy = add_noise(zeros(n_values=2**20 + 2**16 + 5), 1.0, SecureRandom())
    for piece in noisy.split(2**16):
        assert (piece == 0).double().mean() < 0.02 or len(piece) < 100
    assert noisy[-5:].any()
