"""Lower bounds on ε from how well canaries are told apart, with stated confidence.

An attacker guesses "in" where a score is above a threshold that does not depend on the scores it is
applied to. Bounds of the two error rates (Clopper and Pearson, Biometrika 26, 1934) then bound what
any differentially private mechanism could have done.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, norm

from ..errors import positive


class ErrorRates(NamedTuple):
    """Upper bounds of the attacker's two error rates, in [0, 1].

    false_positive: of guessing "in" for a canary that is out; false_negative: the reverse.
    """

    false_positive: float
    false_negative: float


def clopper_pearson_upper(successes: int, trials: int, alpha: float) -> float:
    """The largest probability under which so few successes have a chance of at least ``alpha``.

    Guarantee: below the true probability with a chance of at most ``alpha``, whatever it is. 1 for
    no trials.
    """
    return (
        1.0
        if successes == trials
        else float(beta.ppf(1 - alpha, successes + 1, trials - successes))
    )


def bound_error_rates(
    scores: np.ndarray, is_in: np.ndarray, threshold: float, confidence: float
) -> ErrorRates:
    """Both error rates of guessing "in" above ``threshold``, from above.

    scores float [n], is_in bool [n]. Guarantee: for independent scores and a threshold chosen
    without them, both bounds hold together with probability at least ``confidence``; each fails
    with at most half of the rest. Raises ValueError for a score that is not a number.
    """
    if np.isnan(scores).any():
        raise ValueError("scores must be numbers, got NaN: a released value was not one")
    alpha = (1 - confidence) / 2
    guesses = scores > threshold
    false_positives, false_negatives = int((guesses & ~is_in).sum()), int((~guesses & is_in).sum())
    return ErrorRates(
        clopper_pearson_upper(false_positives, int((~is_in).sum()), alpha),
        clopper_pearson_upper(false_negatives, int(is_in.sum()), alpha),
    )


def epsilon_lower_bound(rates: ErrorRates, delta: float) -> float:
    """ε that every (ε, δ) mechanism with error rates no larger has at least; 0 where none is seen.

    From ``1 - FNR <= e^ε FPR + δ`` and the same with both worlds exchanged (Kairouz, Oh and
    Viswanath, arXiv 1311.0776, theorem 2.1). It assumes nothing else of the mechanism.
    """
    fpr, fnr = rates
    pairs = ((1 - fnr - delta, fpr), (1 - fpr - delta, fnr))
    return max([0.0] + [math.log(seen / missed) for seen, missed in pairs if seen > 0])


def mu_lower_bound(rates: ErrorRates) -> float:
    """μ of the Gaussian trade-off curve through the two rates; 0 where guessing is no help.

    ``max(Φ⁻¹(1 - FPR) - Φ⁻¹(FNR), 0)`` (Dong, Roth and Su, arXiv 1905.02383, definition 6). A
    mechanism that is μ-GDP has no error rates below that curve.
    """
    fpr, fnr = rates
    if fpr == 1 or fnr == 1:
        return 0.0
    return max(float(norm.isf(fpr) - norm.ppf(fnr)), 0.0)


def gdp_delta(mu: float, epsilon: float) -> float:
    """The δ of μ-GDP at ``epsilon``, both finite and >= 0 (arXiv 1905.02383, corollary 1).

    ``Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)``
    """
    if mu == 0:
        return 0.0
    seen = norm.cdf(-epsilon / mu + mu / 2)
    return float(seen - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least ε >= 0 at which μ-GDP has a δ of at most ``delta``, to 1e-9."""
    positive(delta=delta)
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    # Without its second term δ would be reached at this ε, and it only lowers δ.
    most = mu**2 / 2 + mu * float(norm.isf(delta))
    return float(brentq(lambda epsilon: gdp_delta(mu, epsilon) - delta, 0.0, most, xtol=1e-9))
