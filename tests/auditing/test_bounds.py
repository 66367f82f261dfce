"""Bounds against closed forms, integrals and exact mechanisms."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, norm

from dpengine import auditing
from dpengine.auditing import ErrorRates
from dpengine.auditing.bounds import clopper_pearson_upper

FALSE_ALARM = 1e-6


def gaussian_scores(rng, mu, n):
    """What an attacker of an exact μ-GDP mechanism sees, and which half has the record."""
    is_in = np.arange(n) % 2 == 0
    return rng.normal(size=n) + mu * is_in, is_in


@pytest.mark.parametrize("n", [1, 7, 60])
def test_the_bound_of_a_probability_fails_as_seldom_as_it_says(n):
    """Exactly, by summing over all outcomes."""
    bounds = np.array([clopper_pearson_upper(k, n, 0.05) for k in range(n + 1)])
    for p in np.linspace(0.001, 0.999, 333):
        missed = binom.pmf(np.flatnonzero(bounds < p), n, p).sum()
        assert missed <= 0.05 + 1e-12


def test_the_bound_of_a_probability_that_was_never_seen_has_a_closed_form():
    assert clopper_pearson_upper(0, 50, 0.025) == pytest.approx(1 - 0.025 ** (1 / 50), rel=1e-12)
    assert clopper_pearson_upper(0, 0, 0.025) == 1
    assert clopper_pearson_upper(9, 9, 0.025) == 1


def test_both_rates_are_counted_from_their_own_side():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    is_in = np.array([False, False, True, False, True, True])
    rates = auditing.bound_error_rates(scores, is_in, 2.5, 0.9)
    one_of_three = clopper_pearson_upper(1, 3, 0.05)
    assert rates == ErrorRates(one_of_three, one_of_three)
    rates = auditing.bound_error_rates(scores, is_in, 4.0, 0.9)
    # A score at the threshold is no guess: 4 and 2 are missed.
    expected = clopper_pearson_upper(0, 3, 0.05), clopper_pearson_upper(2, 3, 0.05)
    assert rates == ErrorRates(*expected)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        auditing.bound_error_rates(np.array([0.0, math.nan]), np.array([True, False]), 0.5, 0.95)


@pytest.mark.parametrize(("fpr", "fnr"), [(0.1, 0.2), (0.2, 0.1)])
def test_epsilon_of_any_mechanism_by_hand(fpr, fnr):
    delta = 0.01
    expected = math.log((1 - 0.2 - delta) / 0.1)
    assert auditing.epsilon_lower_bound(ErrorRates(fpr, fnr), delta) == pytest.approx(expected)


def test_randomised_response_attains_the_bound():
    """It tells the truth with e^ε / (1 + e^ε): both rates are the rest, δ is 0."""
    lie = 1 / (1 + math.exp(1.3))
    assert auditing.epsilon_lower_bound(ErrorRates(lie, lie), 0.0) == pytest.approx(1.3)


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.6, 0.7), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_no_better_than_a_coin_is_no_evidence(rates):
    assert auditing.mu_lower_bound(ErrorRates(*rates)) == 0
    assert auditing.epsilon_lower_bound(ErrorRates(*rates), 1e-5) == 0


def test_guessing_worse_than_a_coin_is_no_evidence():
    """Scores that point the wrong way: a bound from |μ| would be near 2."""
    rng = np.random.default_rng(0)
    scores, is_in = gaussian_scores(rng, -2.0, 10_000)
    rates = auditing.bound_error_rates(scores, is_in, -1.0, 0.95)
    assert rates.false_positive > 1 - rates.false_negative
    assert auditing.mu_lower_bound(rates) == 0


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, -1.0), (0.1, 3.0)])
def test_mu_by_hand(a, b):
    rates = ErrorRates(norm.sf(a), norm.sf(b))
    assert auditing.mu_lower_bound(rates) == pytest.approx(a + b)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.1, 0.0), (1.0, 0.5), (1.0, 4.0), (5.0, 20.0)])
def test_delta_of_a_gaussian_is_the_integral_of_what_sticks_out(mu, epsilon):
    def excess(x):
        return max(0.0, norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x))

    crossing = epsilon / mu + mu / 2
    expected, _ = quad(excess, crossing, crossing + 40, epsabs=1e-14, points=[mu, mu + 3])
    assert auditing.gdp_delta(mu, epsilon) == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.01])
def test_epsilon_of_a_gaussian_is_where_delta_is_reached(mu, delta):
    epsilon = auditing.gdp_epsilon(mu, delta)
    if epsilon == 0:
        assert 2 * norm.cdf(mu / 2) - 1 <= delta
    else:
        assert auditing.gdp_delta(mu, epsilon) == pytest.approx(delta, rel=1e-5)


def test_epsilon_of_a_gaussian_is_the_known_one():
    """σ = 10, 100 steps on all records, δ = 1e-5 (reference: two accountants agree on it)."""
    assert auditing.gdp_epsilon(1.0, 1e-5) == pytest.approx(4.37718, abs=1e-5)
    assert auditing.gdp_epsilon(0.0, 1e-5) == 0


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_bound_covers_on_exact_gaussian_mechanisms(mu):
    """500 audits: above the truth in at most 5 %, by the binomial's own tail; and never idle."""
    found = []
    for seed in range(500):
        scores, is_in = gaussian_scores(np.random.default_rng(seed), mu, 4000)
        found.append(
            auditing.mu_lower_bound(auditing.bound_error_rates(scores, is_in, mu / 2, 0.95))
        )
    assert (np.array(found) > mu).sum() <= binom.isf(FALSE_ALARM, 500, 0.05)
    # Both rates err by at most 3 + 2 standard errors where their bounds are about 2 above.
    error = math.sqrt(norm.cdf(mu / 2) * norm.sf(mu / 2) / 2000) / norm.pdf(mu / 2)
    assert np.mean(found) > mu - 2 * 2.5 * error


def test_the_bound_of_any_mechanism_covers_on_exact_randomised_response():
    truth = 1.0
    lie, above = 1 / (1 + math.exp(truth)), 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        is_in = rng.random(2000) < 0.5
        scores = (is_in ^ (rng.random(2000) < lie)).astype(float)
        rates = auditing.bound_error_rates(scores, is_in, 0.5, 0.95)
        above += auditing.epsilon_lower_bound(rates, 0.0) > truth
    assert above <= binom.isf(FALSE_ALARM, 500, 0.05)
