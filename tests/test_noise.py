"""The Gaussian mechanism: noise of exactly the promised scale, fresh at every call."""

import math

import pytest
import torch
from scipy import stats

from dpengine.clipping import ClippedSum, empty_sum
from dpengine.noise import add_noise
from dpengine.secure_random import SecureRandom

FALSE_ALARM = 1e-9
SHAPES = [torch.Size((300, 400)), torch.Size((80_001,)), torch.Size((2, 1, 3))]


def zeros(sensitivity=0.7):
    return empty_sum(SHAPES, sensitivity, torch.device("cpu"))


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
    noisy = add_noise(zeros(sensitivity), noise_multiplier, SecureRandom())
    noise = torch.cat([tensor.flatten() for tensor in noisy])
    stddev = noise_multiplier * sensitivity
    # 200,007 draws fix the scale to 0.16 %: 3 % is 19 standard deviations.
    assert has_scale(noise, stddev)
    assert not has_scale(noise, 0.97 * stddev)
    assert not has_scale(noise, 1.03 * stddev)


def test_every_tensor_is_noised_with_mean_zero_and_normal_law():
    for noise in add_noise(zeros(2.0), 3.0, SecureRandom())[:2]:
        z = noise.flatten().numpy() / 6.0
        assert has_scale(noise, 6.0)
        assert 2 * stats.norm.sf(abs(z.mean()) * math.sqrt(z.size)) > FALSE_ALARM
        assert stats.kstest(z, "norm").pvalue > FALSE_ALARM


def test_the_noise_is_added_to_the_sum_in_its_shape_and_in_float64():
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randn(s, dtype=torch.float64, generator=generator) * 1e9 for s in SHAPES]
    noised = add_noise(ClippedSum(sums, 1.0), 2.0, SecureRandom())
    for total, noisy in zip(sums, noised, strict=True):
        assert noisy.shape == total.shape and noisy.dtype == torch.float64
        assert 0 < (noisy - total).abs().max() < 2.0 * 10


def test_no_noise_value_occurs_twice_in_a_call_or_in_two():
    random = SecureRandom()
    noisy = add_noise(zeros(), 1.0, random) + add_noise(zeros(), 1.0, random)
    values = torch.cat([tensor.flatten() for tensor in noisy])
    assert len(values.unique()) == len(values)


def test_the_noise_of_two_tensors_and_of_two_calls_is_uncorrelated():
    shapes = [torch.Size((100_000,))] * 2
    random, silent = SecureRandom(), empty_sum(shapes, 1.0, torch.device("cpu"))
    draws = torch.stack(add_noise(silent, 1.0, random) + add_noise(silent, 1.0, random))
    r = torch.corrcoef(draws) - torch.eye(4)
    assert 6 * 2 * stats.norm.sf(r.abs().max().item() * math.sqrt(100_000)) > FALSE_ALARM


def test_a_seed_does_not_repeat_the_noise():
    def draw():
        torch.manual_seed(0)
        return add_noise(zeros(), 1.0, SecureRandom())

    state = torch.get_rng_state()
    first, second = draw(), draw()
    torch.set_rng_state(state)
    assert not any(torch.isin(a, b).any() for a, b in zip(first, second, strict=True))


def test_the_sum_itself_is_not_changed():
    silent = zeros()
    add_noise(silent, 1.0, SecureRandom())
    assert all((tensor == 0).all() for tensor in silent.tensors)


def test_multiplier_zero_returns_the_sum():
    sums = [torch.arange(3.0, dtype=torch.float64)]
    assert torch.equal(add_noise(ClippedSum(sums, 1.0), 0.0, SecureRandom())[0], sums[0])


@pytest.mark.parametrize("noise_multiplier", [-1e-9, -1.0, math.nan], ids=str)
def test_a_multiplier_below_zero_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise_multiplier"):
        add_noise(zeros(), noise_multiplier, SecureRandom())
