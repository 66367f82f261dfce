"""Tests of noise: their law in a right engine, and their power against faults planted in it."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, norm

from dpengine import audit, auditing
from dpengine.audit import AuditSettings
from dpengine.auditing import Releases
from dpengine.noise import grid_step

FALSE_ALARM = 1e-6
LEVEL = audit.FALSE_ALARM / 33
"""The level of each check of a whole audit, in which there are 33."""


def exact(seed=0, n_releases=64, n_values=128, sigma=1.0):
    """Releases of an exact Gaussian mechanism, each canary in with a fair coin."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_releases, n_values
    entered = torch.rand(shape, generator=generator) < 0.5
    noise = sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Releases(noise + entered, entered)


def failed(releases, sigma=1.0, level=LEVEL):
    checks = auditing.check_releases(releases, sigma)
    return {check.name for check in checks if not check.p_value >= level}


@pytest.mark.parametrize("total", [0.01, 1.0, 1.4, 5.0, 30.0])
def test_chi_square_of_two_squares_has_a_closed_form(total):
    expected = 2 * min(math.exp(-total / 2), -math.expm1(-total / 2))
    assert auditing.chi_square(total, 2) == pytest.approx(expected)


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_what_is_not_finite_is_a_finding(total):
    assert auditing.chi_square(total, 10) == 0


def test_a_sum_of_squares_that_is_right_gives_a_false_alarm_as_seldom_as_it_says():
    sums = np.random.default_rng(0).chisquare(10**6, 4000)
    alarms = sum(auditing.chi_square(float(total), 10**6) < 0.01 for total in sums)
    low, high = (binom.isf(p, 4000, 0.01) for p in (1 - FALSE_ALARM, FALSE_ALARM))
    assert low <= alarms <= high


def test_two_per_cent_too_little_noise_is_seen_in_a_million_residuals():
    """The sum of squares of noise of 0.98 σ is 0.98² χ², exactly."""
    n = 10**6
    caught = chi2.cdf(chi2.ppf(LEVEL / 2, n) / 0.98**2, n)
    assert caught > 0.95
    sums = 0.98**2 * np.random.default_rng(0).chisquare(n, 1000)
    assert sum(auditing.chi_square(float(total), n) < LEVEL for total in sums) >= 950


@pytest.mark.slow
def test_two_per_cent_too_little_noise_is_seen_in_a_million_normals():
    caught = ["size of the noise" in failed(exact(s, 1000, 1000, 0.98)) for s in range(100)]
    assert sum(caught) >= 95


def test_the_interval_of_the_noise_covers():
    """500 exact mechanisms: it fails in 5 %, by the binomial's own tails."""
    missed = 0
    for seed in range(500):
        residuals = exact(seed, 8, 16, sigma=3.0).residuals
        estimate, low, high = auditing.noise_interval(residuals, 0.95)
        assert low < estimate < high
        missed += not low <= 3.0 <= high
    assert binom.isf(1 - FALSE_ALARM, 500, 0.05) <= missed <= binom.isf(FALSE_ALARM, 500, 0.05)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_all_checks_of_exact_noise_raise_false_alarms_as_seldom_as_they_say(sigma):
    level, n_audits = 0.01, 200
    alarms = sum(len(failed(exact(seed, sigma=sigma), sigma, level)) for seed in range(n_audits))
    # Ten checks, of which each is within its level; how they depend on each other costs at most 10.
    assert alarms <= 10 * binom.isf(FALSE_ALARM / 10, n_audits, level)


def test_the_chance_of_the_largest_correlation_is_right():
    """Of three rows, 5 % of audits have p < 0.05: Bonferroni is nearly exact for so few pairs."""
    n_audits = 600
    found = sum(
        "noise used in two releases" in failed(exact(seed, 3, 12), level=0.05)
        for seed in range(n_audits)
    )
    assert found <= binom.isf(FALSE_ALARM, n_audits, 0.05)
    assert found >= binom.isf(1 - FALSE_ALARM, n_audits, 0.04)


def test_one_coordinate_without_noise_is_seen():
    releases = exact()
    releases.values[:, 5] = releases.entered[:, 5].double()
    assert "noise in each coordinate" in failed(releases)


def test_one_release_without_noise_is_seen():
    releases = exact()
    releases.values[5] = releases.entered[5].double()
    assert "noise in each release" in failed(releases)


@pytest.mark.parametrize("sign", [1, -1])
def test_noise_of_one_release_used_again_is_seen(sign):
    releases = exact(n_releases=700)
    residuals = releases.residuals
    releases.values[690] = sign * residuals[3] + releases.entered[690]
    assert failed(releases) == {"noise used in two releases"}


def test_noise_of_one_coordinate_used_for_another_is_seen():
    releases = exact(n_values=700)
    residuals = releases.residuals
    releases.values[:, 690] = residuals[:, 3] + releases.entered[:, 690]
    assert failed(releases) == {"noise used at two coordinates"}


@pytest.mark.parametrize("contribution", [1.03, 0.97])
def test_a_contribution_that_is_not_the_bound_is_seen(contribution):
    releases = exact(n_releases=1000, n_values=1000)
    values = releases.values + (contribution - 1) * releases.entered
    assert "size of a clipped gradient" in failed(Releases(values, releases.entered))


def test_noise_of_another_law_is_seen():
    """All of variance 1, in each coordinate and release, and uncorrelated."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(1000, 1000, generator=generator, dtype=torch.float64)
    z = torch.special.ndtri(uniform)
    short = torch.special.ndtri(norm.cdf(-3.9) + (1 - 2 * norm.cdf(-3.9)) * uniform)
    laws = {
        "signs": (uniform - 0.5).sign(),
        "uniform": (uniform - 0.5) * 12**0.5,
        "zero sum": (z - z.mean(1, keepdim=True)) * (1000 / 999) ** 0.5,
        "short tail": short / short.std(),
    }
    expected = {
        "signs": {"law of the noise", "tail of the noise"},
        "uniform": {"law of the noise", "tail of the noise"},
        "zero sum": {"noise in the sum of a release"},
        "short tail": {"tail of the noise"},
    }
    entered = torch.zeros(1000, 1000, dtype=torch.bool)
    for name, values in laws.items():
        assert failed(Releases(values, entered)) >= expected[name], name
    assert not failed(Releases(z, entered))


def test_noise_on_its_public_grid_has_the_law_that_is_looked_for():
    """A million values see the cells of the grid, unless the law is compared at their borders."""
    step = grid_step(auditing.MAX_GRAD_NORM) / auditing.MAX_GRAD_NORM
    p_values = []
    for seed in range(12):
        releases = exact(seed, 4096, 256)
        values = (releases.values / step).round() * step
        checks = auditing.check_releases(Releases(values, releases.entered), 1.0)
        p_values += [check.p_value for check in checks if check.name == "law of the noise"]
    assert len(p_values) == 12
    assert sum(p < 0.05 for p in p_values) <= binom.isf(FALSE_ALARM, 12, 0.05)


AGAIN = "noise used again at any distance"


def p_value_again(values):
    entered = torch.zeros(values.shape, dtype=torch.bool)
    checks = auditing.check_releases(Releases(values, entered), 1.0)
    return {check.name: check.p_value for check in checks}[AGAIN]


def test_the_distance_at_which_noise_comes_again_by_hand():
    """Of 5, 4, -3 and 2 the sums at distance 1, 2 and 3 are 2, -7 and 10, the last of one edge."""
    values = torch.tensor([[5.0, 4.0], [-3.0, 2.0]], dtype=torch.float64)
    expected = 2 * 3 * math.exp(-(10**2) / (2 * (1 + 2 * 10)))
    assert p_value_again(values) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [1, 8, 1024, 3 * 1024, 3 * 1024 - 8, 512 * 1024])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_or_two_per_cent_of_earlier_noise_is_seen_at_any_distance(distance, sign):
    """Of the last step, of the third before, of other coordinates, of half a run before."""
    values = exact(1, 1024, 1024).residuals.flatten()
    later = values[distance:] + sign * (0.02 if distance > 10**5 else 0.01) * values[:-distance]
    values = torch.cat([values[:distance], later]).view(1024, 1024)
    assert p_value_again(values) < LEVEL


def test_noise_that_begins_again_is_seen_at_other_coordinates():
    """As where a counter wraps: the last tenth of a run is its first, 40 values to the left."""
    values = exact(2, 2000, 64).residuals.flatten()
    again = torch.cat([values[: 1800 * 64 - 40], values[: 200 * 64 + 40]]).view(2000, 64)
    assert p_value_again(again) < LEVEL


def test_the_difference_of_in_and_out_by_hand():
    """Two in, two out: a difference of 3 in means of variance 1/2 + 1/2."""
    entered = torch.tensor([[True, False], [False, True]])
    residuals = torch.tensor([[2.0, -1.0], [-2.0, 1.0]], dtype=torch.float64)
    checks = auditing.check_releases(Releases(residuals + entered, entered), 1.0)
    p_values = {check.name: check.p_value for check in checks}
    assert p_values["size of a clipped gradient"] == pytest.approx(2 * norm.sf(3.0))


@pytest.mark.parametrize(("entries", "is_right"), [(1000, True), (1160, False), (840, False)])
def test_a_sampling_rate_five_standard_errors_off_is_seen(entries, is_right):
    check = auditing.check_rate(entries, 10_000, 0.1)
    assert (check.p_value > 0.5) == is_right
    assert (check.p_value < 1e-6) != is_right


def test_a_rate_of_one_is_exact():
    assert auditing.check_rate(50, 50, 1.0).p_value == 1
    assert auditing.check_rate(49, 50, 1.0).p_value == 0


def test_a_rate_two_in_a_thousand_off_is_seen_in_a_hundred_million_coins():
    """In 95 audits of 100 and more: the power is that of the normal law, for so many coins."""
    n, q = AuditSettings().coins, AuditSettings().sampling_rate
    error = math.sqrt(q * (1 - q) * n)
    assert norm.sf(norm.isf(LEVEL / 2) - 0.002 * q * n / error) > 0.95
    for off, is_seen in ((-0.002, True), (0, False), (0.002, True)):
        check = auditing.check_rate(round(q * (1 + off) * n), n, q)
        assert (check.p_value < LEVEL) == is_seen
