"""ε in closed form, where there is one: all records in every step, or one step, or ε = 0.

Writing μ for the shift between neighbours over the standard deviation of the noise:

- **All records in every step** (q = 1). T Gaussian mechanisms are one with 1/σ² = Σ 1/σ_t², and of
  one, ``δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)`` exactly (Balle and Wang, arXiv 1805.06530,
  theorem 8). μ = 1/σ; 2/σ where a record is replaced by any other.
- **One step on a Poisson sample.** The mixture ``(1 - q) N(0, 1) + q N(μ, 1)`` against ``N(0, 1)``
  has ``max(0, (1-q) f + q g - e^ε f) = q max(0, g - e^ε' f)`` with ``e^ε' = 1 + (e^ε - 1)/q``, so
  its δ at ε is q times that of the Gaussian at ε'. In the other direction
  ``max(0, f - e^ε ((1-q) f + q g)) = c max(0, f - e^ε" g)`` with ``c = 1 - e^ε (1-q)`` and
  ``e^ε" = e^ε q / c``, and 0 where c is not positive; the larger of the two counts.
- **Nothing to tell.** The total variation of composed mechanisms is at most ``1 - Π (1 - TV_t)``,
  with ``TV = q (2 Φ(μ/2) - 1)``. Where that is within δ, ε is 0.

Rounding. With x = ε/μ - μ/2, ``δ = ½ e^(-x²/2) (erfcx(x/√2) - erfcx((x + μ)/√2))``, in which
scipy's erfcx is right to a few ulp; the difference loses a factor of at most (1 + x)/μ of them. μ
below 1e-4 is left to others, so δ is right to 1e-9; the bounds of ε are those at δ (1 ∓ 1e-8).
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr

from .charges import Epsilon, Part

_SLACK = 1e-8
_LEAST_SHIFT = 1e-4
_FURTHEST = 37.0


def bounds(parts: list[Part], delta: float, *, replace_one: bool = False) -> Epsilon | None:
    """Both sides of ε at ``delta``; None where there is no closed form."""
    shifts = [(2 if replace_one else 1) / part.noise_multiplier for part in parts]
    if _total_variation(parts, shifts) <= delta * (1 - _SLACK):
        return Epsilon(0.0, 0.0, 0.0, "analytic")
    if len(parts) != 1 or parts[0].num_steps != 1 or shifts[0] < _LEAST_SHIFT:
        return None
    q, shift = parts[0].sampling_rate, shifts[0]
    if q < 1 and replace_one:
        return None
    lower, estimate, upper = (
        _subsampled(q, shift, delta * factor) for factor in (1 + _SLACK, 1, 1 - _SLACK)
    )
    # The last bits of the roots, which are found to 1e-13.
    lower, upper = lower * (1 - 1e-11), upper * (1 + 1e-11)
    if q < 1 and _delta_of_adding(q, shift, lower) > delta:
        return None
    return Epsilon(lower, estimate, upper, "analytic") if upper < math.inf else None


def gaussian_delta(shift: float, epsilon: float) -> float:
    """δ at ``epsilon`` of two normals that are ``shift`` standard deviations apart."""
    return _delta_at(shift, epsilon / shift - shift / 2)


def _delta_at(shift: float, x: float) -> float:
    far = erfcx((x + shift) / math.sqrt(2))
    if x < 0:
        return float(ndtr(-x) - 0.5 * math.exp(-(x**2) / 2) * far)
    return float(0.5 * math.exp(-(x**2) / 2) * (erfcx(x / math.sqrt(2)) - far))


def _gaussian_epsilon(shift: float, delta: float) -> float:
    """The root of ``gaussian_delta``; 0 where δ is that of ε = 0 or more, which cannot be less."""
    low = -shift / 2
    if delta >= _delta_at(shift, low):
        return 0.0
    if _delta_at(shift, _FURTHEST) > delta:
        return math.inf
    x = brentq(lambda x: _delta_at(shift, x) - delta, low, _FURTHEST, xtol=1e-13, rtol=1e-14)
    return max(0.0, shift * (x + shift / 2))


def _subsampled(q: float, shift: float, delta: float) -> float:
    """ε of removing a record that was sampled with probability q."""
    if delta >= q:
        return 0.0
    epsilon = _gaussian_epsilon(shift, delta / q)
    if q == 1:
        return epsilon
    if epsilon < 700:
        return math.log1p(q * math.expm1(epsilon))
    return float(np.logaddexp(math.log1p(-q), math.log(q) + epsilon))


def _delta_of_adding(q: float, shift: float, epsilon: float) -> float:
    """δ of the other direction at ``epsilon``."""
    if epsilon >= -math.log1p(-q):
        return 0.0
    share = -math.expm1(epsilon + math.log1p(-q))
    return share * gaussian_delta(shift, epsilon + math.log(q) - math.log(share))


def _total_variation(parts: list[Part], shifts: list[float]) -> float:
    log_same = 0.0
    for part, shift in zip(parts, shifts, strict=True):
        apart = part.sampling_rate * (1 - 2 * float(ndtr(-shift / 2)))
        if apart >= 1:
            return 1.0
        log_same += part.num_steps * math.log1p(-apart)
    return -math.expm1(log_same)
