"""The accountant turned round: which noise multipliers the observed error rates rule out."""

import math

from .. import accounting
from ..accounting import AccountingError
from .bounds import ErrorRates

_LARGEST = 700.0  # e to this is near the end of float64, and makes any bound void
_EPS_ERROR = 0.01
_TOLERANCE = 0.002
_MOST = 16.0
"""Searched up to this times the claimed noise multiplier; beyond, the bound is 0."""


def subsampled_epsilon_lower_bound(
    rates: ErrorRates,
    threshold: float,
    *,
    sampling_rate: float,
    num_steps: int,
    delta: float,
    claimed_noise_multiplier: float,
) -> float:
    """ε at ``delta`` of the most noise with which the rates are possible, from below.

    threshold: t >= 0 of the score that the rates are of.

    Proof: were the noise multiplier σ' or more, ``1 - FNR <= e^t FPR + δ_σ'(t)``, so the seen
    ``δ* = 1 - FNR - e^t FPR`` would be at most ``δ_σ'(t)``; that is, ε_σ'(δ*) >= t. A σ' whose ε at
    δ* is certified below t is therefore ruled out, and all larger ones with it, because ε falls
    with σ'. What is left has at least the ε of the smallest one that was ruled out. The bound holds
    for any score; it is tight for log-likelihood ratios, of which ``score > t`` is the set that
    attains δ(t). It assumes Poisson sampling at ``sampling_rate``.
    """
    seen = 1 - rates.false_negative - math.exp(min(threshold, _LARGEST)) * rates.false_positive
    if not 0 < seen < 1:
        return 0.0

    def is_ruled_out(log_sigma: float) -> bool:
        try:
            bounds = accounting.compute_epsilon(
                sampling_rate, math.exp(log_sigma), num_steps, seen, eps_error=_EPS_ERROR
            )
        except AccountingError:
            return False
        return bounds.upper < threshold

    high = math.log(claimed_noise_multiplier)
    most = high + math.log(_MOST)
    while not is_ruled_out(high):
        high += 0.1
        if high > most:
            return 0.0
    low = high - 0.1
    while is_ruled_out(low):
        high, low = low, low - 0.1
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if is_ruled_out(middle) else (middle, high)
    return accounting.lower_epsilon(sampling_rate, math.exp(high), num_steps, delta)
