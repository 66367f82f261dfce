"""Closed forms against the integrals they solve, and against a second library."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy import integrate, stats

from dpengine.accounting import (
    AccountingError,
    Charge,
    calibrate_noise_multiplier,
    compute_epsilon,
    spent,
    spent_together,
)
from dpengine.accounting.analytic import bounds
from dpengine.accounting.charges import Part


def hockey_stick(q, sigma, epsilon, direction):
    """∫ max(0, p - e^ε p') of one step on a Poisson sample, by quadrature in pieces."""
    mean = 1 / sigma

    def densities(z):
        without, record = stats.norm.pdf(z), stats.norm.pdf(z - mean)
        pair = (1 - q) * without + q * record, without
        if direction == "replace":
            return pair[0], (1 - q) * without + q * stats.norm.pdf(z + mean)
        return pair if direction == "remove" else pair[::-1]

    def gap(z):
        p, other = densities(z)
        return max(0.0, p - math.exp(epsilon) * other)

    edges = np.linspace(-40, mean + 40, 400)
    pieces = itertools.pairwise(edges)
    return sum(integrate.quad(gap, a, b, epsabs=0, epsrel=1e-9, limit=200)[0] for a, b in pieces)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("q", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@pytest.mark.parametrize("ways", [("remove", "add"), ("replace",)], ids="-".join)
def test_delta_at_the_epsilon_of_one_step_is_delta(q, sigma, delta, ways):
    found = bounds([Part(q, sigma, 1)], delta, replace_one=ways == ("replace",))
    assert 0 <= found.lower <= found.estimate <= found.upper
    deltas = [hockey_stick(q, sigma, found.upper, way) for way in ways]
    if found.upper == 0:
        assert max(deltas) <= delta
    else:
        assert max(deltas) == pytest.approx(delta, rel=1e-5)
        assert found.upper - found.lower <= 1e-6 * max(1, found.upper)


@pytest.mark.parametrize(
    ("q", "sigma", "num_steps", "delta"),
    [(1.0, 10.0, 100, 1e-5), (1.0, 1e-5, 1, 1e-5), (1.0, 50.0, 10_000, 1e-9)],
)
def test_steps_on_all_records_are_one_gaussian(q, sigma, num_steps, delta):
    """δ at the answer, from the normal distribution in 60 digits' worth of logarithms."""
    epsilon = compute_epsilon(q, sigma, num_steps, delta).upper
    shift = math.sqrt(num_steps) / sigma
    log_first = stats.norm.logsf(epsilon / shift - shift / 2)
    log_second = epsilon + stats.norm.logsf(epsilon / shift + shift / 2)
    assert math.exp(log_first) * -math.expm1(log_second - log_first) == pytest.approx(delta, 1e-4)


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 10.0])
def test_a_plan_on_all_records_spends_its_whole_budget(target):
    sigma = calibrate_noise_multiplier(target, 1e-5, 1.0, 32, 1000)
    found = spent(1.0, sigma, 32, 1e-5, 1000)
    assert target * (1 - 1e-6) <= found.upper <= target
    assert found.accountant == "analytic"


def test_where_delta_covers_all_that_can_be_told_epsilon_is_zero():
    assert compute_epsilon(0.01, 0.1, 1, 0.01).upper == 0
    assert compute_epsilon(1e-6, 0.5, 1000, 1e-2).upper == 0
    assert compute_epsilon(0.02, 0.1, 1, 0.01).upper > 0
    # A record that is hardly ever drawn, whatever the noise and its tail.
    assert spent(0.01, 0.1, 1, 0.01, 10**6).upper == 0
    assert spent(0.001, 1e-5, 10, 0.01, 10**6, "replace-one").upper == 0
    with pytest.raises(AccountingError, match="tail"):
        spent(0.001, 1e-5, 11, 0.01, 10**6)


def test_replaced_records_are_twice_as_far_apart():
    one = spent_together([Charge(1.0, 2.0, 3, 1)], 1e-5, "replace-one").upper
    assert one == pytest.approx(compute_epsilon(1.0, 1.0, 3, 1e-5).upper, rel=1e-6)
    # Of one step on a sample, the shift is twice as large only where the record is drawn.
    half = bounds([Part(0.5, 2.0, 1)], 1e-5, replace_one=True).upper
    assert (
        compute_epsilon(0.5, 2.0, 1, 1e-5).upper < half < compute_epsilon(0.5, 1.0, 1, 1e-5).upper
    )


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.01), (2.0, 0.3), (0.8, 0.7)])
def test_a_second_library_agrees_on_one_step(sigma, q):
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    loss = from_gaussian_mechanism(
        sigma,
        value_discretization_interval=1e-5,
        sampling_prob=q,
        neighboring_relation=relation,
    )
    theirs = loss.get_epsilon_for_delta(1e-6)
    assert bounds([Part(q, sigma, 1)], 1e-6).upper == pytest.approx(theirs, rel=1e-4, abs=1e-4)
