"""The tail of the noise against the geometry of a disc."""

import math

import numpy as np
import pytest

from dpengine.accounting import noise_tail_delta
from dpengine.mechanism.secure_random import MAX_GAUSSIAN


def leaving(shift):
    """Probability that a draw from the disc of radius R around ``shift`` is outside its own.

    In polar coordinates around the shifted centre: the draw leaves beyond the radius where its
    ray meets the other rim, ``(1/2π) ∫ (exp(-r(θ)²/2) - exp(-R²/2))₊ dθ``.
    """
    angle = (np.arange(20_000) + 0.5) * np.pi / 20_000
    rim = -shift * np.cos(angle) + np.sqrt(
        np.maximum(MAX_GAUSSIAN**2 - (shift * np.sin(angle)) ** 2, 0)
    )
    rim = np.clip(rim, 0, MAX_GAUSSIAN)
    gain = np.expm1((MAX_GAUSSIAN**2 - rim**2) / 2)
    return float(math.exp(-(MAX_GAUSSIAN**2) / 2) * gain.mean())


def test_leaving_agrees_with_its_first_order():
    density = MAX_GAUSSIAN * math.exp(-(MAX_GAUSSIAN**2) / 2)
    assert leaving(1e-6) == pytest.approx(1e-6 * density / math.pi, rel=1e-4)


@pytest.mark.parametrize("parameters", [1, 2, 100, 10**4, 10**6, 10**8], ids="P={}".format)
@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.0, 10.0, 100.0], ids="sigma={}".format)
def test_the_tail_charge_covers_a_contribution_spread_over_any_number_of_pairs(sigma, parameters):
    charge = noise_tail_delta(0.2, sigma, 30, parameters) / (0.2 * 30)
    n_pairs = 1
    while n_pairs <= max(1, parameters // 2):
        shift = 1 / (sigma * math.sqrt(n_pairs))
        assert n_pairs * leaving(shift) <= charge, f"{n_pairs} pairs"
        n_pairs *= 2


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.0], ids="sigma={}".format)
def test_the_tail_charge_is_at_most_twice_what_one_pair_loses(sigma):
    one_pair = leaving(1 / sigma)
    assert one_pair <= noise_tail_delta(1.0, sigma, 1, 2) <= 2 * one_pair


def test_the_tail_charge_is_linear_in_steps_and_rate():
    once = noise_tail_delta(1.0, 1.0, 1, 100)
    assert noise_tail_delta(0.25, 1.0, 1000, 100) == pytest.approx(250 * once)
