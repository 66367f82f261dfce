"""Rényi divergences against exact arithmetic, quadrature and a second library."""

import math
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad
from scipy.stats import norm

from dpengine.accounting import rdp
from dpengine.accounting.charges import Part

SETTINGS = [(0.01, 1.0), (0.3, 0.6), (1e-4, 2.0), (0.9, 5.0), (0.2, 0.5)]


@pytest.mark.parametrize(("q", "sigma"), SETTINGS)
@pytest.mark.parametrize("order", [2, 3, 10, 64])
def test_a_whole_order_is_the_binomial_sum(q, sigma, order):
    rate = Fraction(q)
    exact = sum(
        math.comb(order, k)
        * rate**k
        * (1 - rate) ** (order - k)
        * Fraction(math.exp((k * k - k) / (2 * sigma**2) - shift))
        for shift in [max(0.0, (order**2 - order) / (2 * sigma**2) - 600)]
        for k in range(order + 1)
    )
    logarithm = math.log(exact) + max(0.0, (order**2 - order) / (2 * sigma**2) - 600)
    assert rdp.log_moment_of_integer(q, sigma, order) == pytest.approx(logarithm, rel=1e-9)
    assert rdp.log_moment(q, sigma, order) == pytest.approx(logarithm, rel=1e-9)


@pytest.mark.parametrize(("q", "sigma"), SETTINGS)
@pytest.mark.parametrize("order", [1.01, 1.5, 2.7, 10.8])
def test_an_order_between_is_the_integral(q, sigma, order):
    def integrand(z):
        ratio = 1 - q + q * math.exp((2 * z - 1) / (2 * sigma**2))
        return norm.pdf(z, scale=sigma) * ratio**order

    peaks = sorted({-5 * sigma, 0.0, 0.5, order, order + 5 * sigma})
    value, error = quad(
        integrand, -12 * sigma, order + 12 * sigma, points=peaks, limit=500, epsabs=0, epsrel=1e-11
    )
    assert error < 1e-9 * value
    assert rdp.log_moment(q, sigma, order) == pytest.approx(math.log(value), rel=1e-8, abs=1e-12)


def test_a_rate_of_one_is_the_gaussian_s_own_divergence():
    assert rdp.log_moment(1.0, 2.0, 3.5) == rdp.log_moment_of_integer(1.0, 2.0, 3.5)
    assert rdp.log_moment(1.0, 2.0, 3.5) / 2.5 == pytest.approx(3.5 / (2 * 2.0**2))


@pytest.mark.parametrize("delta", [1e-5, 1e-10, 1e-15], ids="delta={:g}".format)
@pytest.mark.parametrize(
    "parts",
    [
        [Part(0.01, 1.0, 1000)],
        [Part(1.0, 10.0, 100)],
        [Part(0.02, 1.1, 300), Part(0.1, 2.0, 40), Part(1.0, 8.0, 1)],
    ],
    ids=str,
)
def test_the_bound_is_that_of_a_second_library_on_the_same_orders(parts, delta):
    orders = [*rdp._FRACTIONAL, *rdp._INTEGER[rdp._INTEGER <= 512]]
    other = RdpAccountant(orders)
    for part in parts:
        event = dp_accounting.GaussianDpEvent(part.noise_multiplier)
        if part.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(part.sampling_rate, event)
        other.compose(event, part.num_steps)
    assert rdp.upper(parts, delta) == pytest.approx(other.get_epsilon(delta), rel=1e-6)


def test_of_many_parts_the_bound_is_looser_and_never_lower():
    many = [Part(0.01, 1.0 + i / 1000, 10) for i in range(rdp._MANY + 1)]
    least = rdp.upper([Part(0.01, 1.0 + 21 / 1000, 10 * len(many))], 1e-5)
    assert (
        least <= rdp.upper(many, 1e-5) <= rdp.upper([Part(0.01, 1.0, 10 * len(many))], 1e-5) * 1.1
    )


def test_where_no_order_between_can_be_had_the_whole_ones_still_bound():
    assert rdp.log_moment(0.5, 1e-3, 1.5) == math.inf
    assert 5e11 < rdp.upper([Part(0.5, 1e-3, 10**6)], 1e-5) < 5e12
