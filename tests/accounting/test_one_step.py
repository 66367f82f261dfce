"""The curve of one step against sixty digits, within the margin that its users add."""

import random

import mpmath as mp
import numpy as np
import pytest

from dpengine.accounting import one_step


def gaussian(shift, epsilon):
    """δ of N(shift, 1) against N(0, 1): the difference of two masses above the same output."""
    x = epsilon / shift - shift / 2
    return mp.ncdf(-x) - mp.exp(epsilon) * mp.ncdf(-x - shift)


def delta(direction, q, sigma, epsilon):
    """The δ of a step from its two densities; nothing of the closed forms is used for replacing."""
    q, shift, epsilon = mp.mpf(q), 1 / mp.mpf(sigma), mp.mpf(epsilon)
    if direction == "remove":
        return q * gaussian(shift, mp.log(1 + mp.expm1(epsilon) / q))
    if direction == "add":
        share = 1 - mp.exp(epsilon) * (1 - q)
        return share * gaussian(shift, epsilon + mp.log(q / share)) if share > 0 else mp.mpf(0)
    odds = mp.exp(shift**2 / 2) * mp.sinh(epsilon / 2) * (1 - q) / q
    z = (epsilon / 2 + mp.asinh(odds)) / shift
    with_it = (1 - q) * mp.ncdf(-z) + q * mp.ncdf(shift - z)
    return with_it - mp.exp(epsilon) * ((1 - q) * mp.ncdf(-z) + q * mp.ncdf(-z - shift))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the branch that is not taken
@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
def test_a_curve_lies_below_the_truth_by_less_than_its_margin(direction):
    """Over all magnitudes of rate, noise and ε, to the last bits before adding's curve ends."""
    chance = random.Random(0)
    n_seen = 0
    with mp.workdps(60):
        for _ in range(400):
            q, sigma = 10 ** chance.uniform(-6, -0.001), 10 ** chance.uniform(-2.5, 4)
            most = 1 / (2 * sigma**2) + chance.uniform(0, 30) / sigma
            most = -np.log1p(-q) if direction == "add" else most
            epsilon = float(most * chance.choice([chance.random(), chance.random() ** 3]))
            if chance.random() < 0.2:
                epsilon = max(float(most * (1 - 10 ** chance.uniform(-15, -1))), 0.0)
            true = delta(direction, q, sigma, epsilon)
            if true < mp.mpf("1e-290"):
                continue
            found = one_step.curves(q, sigma, direction)[0](np.array([epsilon]))[0]
            assert found * (1 + one_step.margin(sigma)) >= true
            assert found <= true * (1 + one_step.margin(sigma)) + 2.0**-49 * (1 - np.log1p(-q))
            n_seen += 1
    assert n_seen > 200
