"""Noise for a budget: certified, not too much, and not weakened by a cache."""

import json
import math

import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy.optimize import brentq
from scipy.stats import norm

from dpengine.accounting import (
    EPS_ERROR,
    AccountingError,
    Epsilon,
    calibrate_noise_multiplier,
    composition,
    noise_tail_delta,
    spent,
)


def gaussian_dp_epsilon(mu, delta):
    """ε of μ-Gaussian DP (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def excess(eps):
        log_second = eps + norm.logcdf(-eps / mu - mu / 2)
        return norm.cdf(-eps / mu + mu / 2) - math.exp(log_second) - delta

    return brentq(excess, 0, 10 * mu * (mu + 10), xtol=1e-12)


def replace_accountant(monkeypatch, epsilon):
    """``epsilon(q, sigma, num_steps, delta)`` in the place of the accountants'."""

    def composed(charges, delta, adjacency, eps_error):
        (charge,) = charges
        return epsilon(*charge[:3], delta)

    monkeypatch.setattr(composition, "composed", composed)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


CALIBRATIONS = [
    # epsilon, delta, q, T, P
    (8.0, 1e-4, 1.0, 60, 10**4),
    (1.0, 1e-5, 1.0, 1, 10),
    (0.05, 1e-6, 1.0, 10, 10**6),
    pytest.param(1.5, 1e-5, 0.25, 2, 10**4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("epsilon", "delta", "q", "num_steps", "parameters"), CALIBRATIONS)
def test_the_noise_is_certified_and_not_one_per_cent_too_much(
    cache, epsilon, delta, q, num_steps, parameters
):
    sigma = calibrate_noise_multiplier(epsilon, delta, q, num_steps, parameters)
    assert spent(q, sigma, num_steps, delta, parameters).upper <= epsilon
    weaker = spent(q, 0.99 * sigma, num_steps, delta, parameters)
    assert weaker.upper > epsilon - EPS_ERROR
    assert json.loads(json.dumps(sigma)) == sigma
    # The second library agrees that the target holds, with less than 2 % of it to spare.
    if q == 1:
        exact = gaussian_dp_epsilon(math.sqrt(num_steps) / sigma, delta)
    else:
        loss = from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-4)
        exact = loss.self_compose(num_steps).get_epsilon_for_delta(delta)
    assert epsilon - 2 * EPS_ERROR - 0.02 * epsilon <= exact <= epsilon


def test_no_target_needs_no_noise(cache):
    assert calibrate_noise_multiplier(math.inf, 1e-5, 0.1, 10, 100) == 0


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan], ids=str)
def test_a_target_that_is_none_is_refused(cache, epsilon):
    with pytest.raises(ValueError, match="target_epsilon"):
        calibrate_noise_multiplier(epsilon, 1e-5, 0.1, 10, 100)


@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "num_steps"),
    [
        (0.1, 1e-5, 1.0, 32),
        (1e-3, 1e-5, 0.1, 10),
        (1.0, 1e-12, 0.01, 1000),
        (0.5, 1e-8, 4e-4, 300),
    ],
)
def test_the_whole_budget_is_spent(cache, epsilon, delta, q, num_steps, adjacency):
    sigma = calibrate_noise_multiplier(epsilon, delta, q, num_steps, 1000, adjacency)
    upper = spent(q, sigma, num_steps, delta, 1000, adjacency).upper
    assert (1 - 1e-6) * epsilon <= upper <= epsilon


def test_no_noise_is_chosen_whose_tail_is_more_than_a_thousandth_of_delta(cache):
    sigma = calibrate_noise_multiplier(500.0, 1e-5, 1.0, 1, 100)
    assert 0.9e-8 <= noise_tail_delta(1.0, sigma, 1, 100) <= 1e-8
    assert spent(1.0, sigma, 1, 1e-5, 100).upper < 500


@pytest.mark.slow
def test_a_target_that_needs_too_little_noise_is_refused_with_a_sentence(cache):
    # ε = 10,000 needs σ near 0.007, where the tail of the noise is longer than delta.
    with pytest.raises(AccountingError, match="choose an epsilon"):
        calibrate_noise_multiplier(1e4, 1e-5, 1.0, 1, 100)


def test_a_target_without_a_certified_noise_is_refused_with_a_sentence(cache, monkeypatch):
    monkeypatch.setattr(composition, "noise_tail_delta", lambda *_: 1.0)
    with pytest.raises(AccountingError, match="choose an epsilon"):
        calibrate_noise_multiplier(*SETTING)


SETTING = (1.0, 1e-4, 1.0, 4, 10**4)


@pytest.fixture
def evaluations(monkeypatch):
    """What a quick stand-in for the accountant was asked."""
    calls = []

    def stand_in(q, sigma, num_steps, delta):
        calls.append((q, sigma, num_steps, delta))
        estimate = q * math.sqrt(-2 * num_steps * math.log(delta)) / sigma
        return Epsilon(estimate - EPS_ERROR, estimate, estimate + EPS_ERROR, "prv")

    replace_accountant(monkeypatch, stand_in)
    return calls


def test_a_cached_calibration_is_certified_again_but_not_searched_again(cache, evaluations):
    sigma = calibrate_noise_multiplier(*SETTING)
    assert len(evaluations) > 2
    evaluations.clear()
    assert calibrate_noise_multiplier(*SETTING) == sigma
    assert len(evaluations) == 1


@pytest.mark.parametrize("index", range(5))
def test_another_setting_does_not_use_the_cache(cache, evaluations, index):
    calibrate_noise_multiplier(*SETTING)
    evaluations.clear()
    other = [0.9, 0.9e-4, 0.5, 3, 10**4 + 1]
    calibrate_noise_multiplier(*SETTING[:index], other[index], *SETTING[index + 1 :])
    assert len(evaluations) > 1


POISON = ["", "nonsense", "null", "[3.0]", "true", "NaN", "Infinity", "-3.0", "0.0", "1", "1e999"]
WEAK = ["6.0", "0.5", "0.01", "1e-6", "1e-100", "1e-200"]


@pytest.mark.parametrize("content", POISON + WEAK)
def test_a_poisoned_cache_cannot_weaken_the_noise(cache, evaluations, content):
    sigma = calibrate_noise_multiplier(*SETTING)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    file.write_text(content)
    assert calibrate_noise_multiplier(*SETTING) == sigma


def test_a_cache_that_cannot_be_written_changes_nothing(cache, evaluations, monkeypatch):
    sigma = calibrate_noise_multiplier(*SETTING)
    file = cache / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert calibrate_noise_multiplier(*SETTING) == sigma
