"""Composed bounds against the inversion of the exact moment generating function."""

import itertools
import math

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from dpengine.accounting import compute_epsilon, pld
from dpengine.accounting.charges import Part


class Step:
    """One step on a grid of outputs z so fine that sums are integrals to rounding."""

    def __init__(self, q, sigma, direction):
        self.z = np.linspace(-40, 40 + 1 / sigma, 40_001)
        shift = 1 / sigma

        def mixture(sign):
            ratio = sign * shift * self.z - shift**2 / 2
            return np.logaddexp(np.log1p(-q), np.log(q) + ratio)

        spacing = self.z[1] - self.z[0]
        normal = -(self.z**2) / 2 + math.log(spacing / math.sqrt(2 * math.pi))
        if direction == "add":
            self.loss, self.log_mass = -mixture(1), normal
        else:
            below = mixture(-1) if direction == "replace" else 0.0
            self.loss, self.log_mass = mixture(1) - below, normal + mixture(1)

    def tilted(self, order):
        """ln E e^(λ L), and the masses of L tilted by it."""
        log_weights = self.log_mass + order * self.loss
        log_moment = logsumexp(log_weights)
        return log_moment, np.exp(log_weights - log_moment)


def delta_by_inversion(q, sigma, num_steps, epsilon, direction="remove"):
    """``(1/2πi) ∫ M(s)^T e^(-s ε) / (s (s + 1)) ds`` along Re s = λ, M = E e^(s L).

    The transform of ``max(0, 1 - e^(ε - l))`` in l is 1/(s (s + 1)); λ is the saddle point. Nothing
    is discretised that the bound discretises. Fit for losses that many steps have smoothed.
    """
    step = Step(q, sigma, direction)
    low, high = 1e-6, 1e6
    for _ in range(60):
        order = math.sqrt(low * high)
        _, masses = step.tilted(order)
        low, high = (low, order) if num_steps * (masses @ step.loss) > epsilon else (order, high)
    log_moment, masses = step.tilted(order)
    kept = masses > 1e-18 * masses.max()
    loss, masses = step.loss[kept], masses[kept]
    mean = float(masses @ loss)
    deviation = math.sqrt(num_steps * float(masses @ (loss - mean) ** 2))
    spacing = min(0.1 / deviation, 0.1 * order)
    total = 0.0
    for block in itertools.count():
        t = spacing * (np.arange(100) + 100 * block)
        s = order + 1j * t
        power = (np.exp(1j * np.outer(t, loss - mean)) @ masses) ** num_steps
        values = power * np.exp(-1j * t * (epsilon - num_steps * mean)) / (s * (s + 1))
        values[0] /= 2 if block == 0 else 1
        total += float(values.real.sum()) * spacing
        if np.abs(values[-20:]).max() < 1e-7 / (order * (order + 1)):
            break
        assert block < 100, "the losses are not smooth enough"
    return math.exp(num_steps * log_moment - order * epsilon) * total / math.pi


SETTINGS = [
    # q, σ, T, δ: what was 0.0739 for 0.0159, and rates and noises from one end to the other
    (0.5, 1.0, 1000, 1e-12),
    (0.5, 100.0, 100_000, 1e-5),
    (0.1, 3.0, 10, 1e-2),
    (0.1, 100.0, 1000, 1e-12),
    (0.01, 1.0, 1000, 1e-12),
    (0.01, 1.0, 1000, 1e-15),
    (0.01, 10.0, 100_000, 1e-8),
    (4e-4, 10.0, 1000, 1e-10),
    (4e-4, 1.0, 100_000, 1e-12),
]
FEW = (0, 4, 7)
MARKED = [
    setting if number in FEW else pytest.param(*setting, marks=pytest.mark.slow)
    for number, setting in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("q", "sigma", "num_steps", "delta"), MARKED)
def test_the_bound_is_within_a_thousandth_of_the_truth_and_not_below_it(q, sigma, num_steps, delta):
    upper = compute_epsilon(q, sigma, num_steps, delta).upper
    assert delta_by_inversion(q, sigma, num_steps, upper) <= delta * (1 + 1e-6)
    assert delta_by_inversion(q, sigma, num_steps, upper, "add") <= delta * (1 + 1e-6)
    assert delta_by_inversion(q, sigma, num_steps, 0.999 * upper) > delta


@pytest.mark.parametrize(
    ("q", "sigma", "num_steps", "delta"),
    [(0.01, 1.0, 1000, 1e-12), pytest.param(0.3, 4.0, 200, 1e-7, marks=pytest.mark.slow)],
)
def test_replace_one_is_within_a_thousandth_of_the_truth_and_not_below_it(
    q, sigma, num_steps, delta
):
    upper = compute_epsilon(q, sigma, num_steps, delta, "replace-one").upper
    assert delta_by_inversion(q, sigma, num_steps, upper, "replace") <= delta * (1 + 1e-6)
    assert delta_by_inversion(q, sigma, num_steps, 0.999 * upper, "replace") > delta


@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
def test_the_inversion_itself_is_right_for_one_gaussian_in_effect(direction):
    """A rate near 1 is a Gaussian of shift √T/σ, or twice that, whose δ has a closed form."""
    shift = math.sqrt(50) / 20 * (2 if direction == "replace" else 1)
    exact = norm.sf(2 / shift - shift / 2) - math.exp(2) * norm.sf(2 / shift + shift / 2)
    found = delta_by_inversion(1 - 1e-12, 20.0, 50, 2.0, direction)
    assert found == pytest.approx(exact, rel=1e-6)


def test_a_coarser_grid_only_raises_the_bound():
    bounds = [
        pld.upper([Part(0.02, 0.9, 500)], 1e-7, tolerance=t) for t in (1e-1, 1e-2, 1e-3, 1e-5)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] <= 1.1 * bounds[-1]


def test_losses_of_two_rates_compose_like_those_of_one():
    """Steps of one mechanism, counted in two parts of its rate and noise, cost the same."""
    whole = pld.upper([Part(0.05, 1.3, 300)], 1e-9)
    split = pld.upper([Part(0.05, 1.3, 100), Part(0.05, 1.3, 200)], 1e-9)
    assert split == pytest.approx(whole, rel=1e-9)


def test_no_answer_needs_more_than_a_grid_that_one_waits_for(monkeypatch):
    monkeypatch.setattr(pld, "_MAX_NODES", 1)
    assert pld.upper([Part(0.05, 1.3, 300)], 1e-9) is None
