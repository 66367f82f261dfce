"""Thresholds chosen on one half of the canaries, to be used on the other half."""

from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from .bounds import ErrorRates, bound_error_rates, epsilon_lower_bound, mu_lower_bound

_LARGEST = 700.0  # e to this is near the end of float64, and makes any bound void
_N_CANDIDATES = 200
_LEAST_MU = 0.01


def threshold_for_epsilon(
    scores: np.ndarray, is_in: np.ndarray, delta: float, confidence: float
) -> float:
    """The threshold whose bound ``epsilon_lower_bound`` is largest on these canaries."""
    return _best(
        _candidates(scores),
        lambda threshold: epsilon_lower_bound(
            bound_error_rates(scores, is_in, threshold, confidence), delta
        ),
    )


def threshold_for_inversion(scores: np.ndarray, is_in: np.ndarray, confidence: float) -> float:
    """The threshold t >= 0 at which δ(t) tells most about the noise; scores are log-likelihoods.

    How far δ(t) moves with the noise, ``∂δ/∂μ = φ(-t/μ + μ/2)`` were the mechanism Gaussian, over
    how far its bound is from its estimate. A bad choice makes the bound low, never wrong.
    """
    observed = _observed(scores, is_in, 0.0)
    mu = max(mu_lower_bound(observed), _LEAST_MU)

    def power(threshold: float) -> float:
        seen = _observed(scores, is_in, threshold)
        bound = bound_error_rates(scores, is_in, threshold, confidence)
        times = float(np.exp(min(threshold, _LARGEST)))
        width = bound.false_negative - seen.false_negative
        width += times * (bound.false_positive - seen.false_positive)
        return float(norm.pdf(-threshold / mu + mu / 2)) / width

    return _best(np.unique(np.append(_candidates(scores).clip(min=0), 0.0)), power)


def _candidates(scores: np.ndarray) -> np.ndarray:
    return np.quantile(scores, np.linspace(0, 1, _N_CANDIDATES + 2)[1:-1])


def _best(candidates: np.ndarray, gain: Callable[[float], float]) -> float:
    return float(max(candidates, key=lambda threshold: gain(float(threshold))))


def _observed(scores: np.ndarray, is_in: np.ndarray, threshold: float) -> ErrorRates:
    guesses = scores > threshold
    n_in, n_out = max(int(is_in.sum()), 1), max(int((~is_in).sum()), 1)
    return ErrorRates(
        float((guesses & ~is_in).sum()) / n_out, float((~guesses & is_in).sum()) / n_in
    )
