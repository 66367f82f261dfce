"""The accountant turned round, where the error rates are known without sampling."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from dpengine import accounting, auditing
from dpengine.auditing import ErrorRates, subsampled_epsilon_lower_bound

DELTA = 1e-5


def gaussian_rates(sigma, t):
    """Of guessing where the log-likelihood ratio of N(1, σ²) to N(0, σ²) is above t."""
    x = sigma**2 * t + 0.5
    return ErrorRates(norm.sf(x / sigma), norm.cdf((x - 1) / sigma))


def sampled_rates(q, sigma, t):
    """The same for a record that enters with probability q."""
    x = sigma**2 * math.log((math.exp(t) - 1 + q) / q) + 0.5
    missed = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
    return ErrorRates(norm.sf(x / sigma), missed)


@pytest.mark.parametrize("claimed", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("t", [0.3, 1.0])
def test_exact_rates_of_a_gaussian_give_its_epsilon_whatever_is_claimed(claimed, t):
    truth = auditing.gdp_epsilon(1.0, DELTA)
    found = subsampled_epsilon_lower_bound(
        gaussian_rates(1.0, t),
        t,
        sampling_rate=1.0,
        num_steps=1,
        delta=DELTA,
        claimed_noise_multiplier=claimed,
    )
    # What a step of the search and the accountant's interval of 0.02 can cost, and no more.
    assert 0.9 * truth < found <= truth


@pytest.mark.slow
def test_exact_rates_of_one_poisson_step_give_its_epsilon():
    truth = accounting.compute_epsilon(0.3, 1.0, 1, DELTA, eps_error=0.01)
    found = subsampled_epsilon_lower_bound(
        sampled_rates(0.3, 1.0, 0.3),
        0.3,
        sampling_rate=0.3,
        num_steps=1,
        delta=DELTA,
        claimed_noise_multiplier=1.0,
    )
    assert 0.9 * truth.estimate < found <= truth.upper


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.3, 0.9), (0.0, 0.0)])
def test_rates_that_say_nothing_give_nothing(rates):
    """The last pair is of a score that leaves no doubt, which no finite noise explains."""
    found = subsampled_epsilon_lower_bound(
        ErrorRates(*rates),
        0.2,
        sampling_rate=1.0,
        num_steps=1,
        delta=DELTA,
        claimed_noise_multiplier=1.0,
    )
    assert found == 0


def test_an_accountant_without_an_answer_rules_nothing_out(monkeypatch):
    def fail(*args, **kwargs):
        raise accounting.AccountingError("no answer")

    monkeypatch.setattr(accounting, "compute_epsilon", fail)
    found = subsampled_epsilon_lower_bound(
        gaussian_rates(0.5, 1.0),
        1.0,
        sampling_rate=1.0,
        num_steps=1,
        delta=DELTA,
        claimed_noise_multiplier=1.0,
    )
    assert found == 0


@pytest.mark.slow
def test_the_bound_covers_with_thresholds_chosen_on_the_other_half():
    """100 exact Gaussian mechanisms, thresholds and all."""
    truth, above = auditing.gdp_epsilon(1.0, DELTA), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        is_in = rng.random((2, 2000)) < 0.5
        scores = rng.normal(size=(2, 2000)) + is_in - 0.5
        t = auditing.threshold_for_inversion(scores[0], is_in[0], 0.95)
        rates = auditing.bound_error_rates(scores[1], is_in[1], t, 0.95)
        above += (
            subsampled_epsilon_lower_bound(
                rates,
                t,
                sampling_rate=1.0,
                num_steps=1,
                delta=DELTA,
                claimed_noise_multiplier=1.0,
            )
            > truth
        )
    assert above <= binom.isf(1e-6, 100, 0.05)
