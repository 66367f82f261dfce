"""ε in closed form, where there is one: ε = 0, all records in every step, or one step.

- **Nothing to tell.** Mechanisms of total variation TV_t, composed, have at most
  ``1 - Π (1 - TV_t)``, by coupling each step's outputs; a step has q (2 Φ(a/2) - 1) for neighbours
  a = 1/σ apart, or 2/σ where a record is replaced by any other. Where that is within δ, ε is 0.
- **All records in every step** (q = 1). T Gaussian mechanisms are one with 1/σ² = Σ 1/σ_t².
- **One step.** Its δ at each ε is that of ``one_step``, the worse of adding and removing a record.

Rounding: ``upper`` is a float at which δ, computed and multiplied by 1 + ``one_step.margin``, was
seen to be within the δ asked for, so that no root finder is relied upon; ``lower`` is one at which
it was seen to be above.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from scipy.optimize import brentq
from scipy.special import ndtr

from . import one_step
from .charges import Charge, Epsilon, Part

_ZERO = Epsilon(0.0, 0.0, 0.0, "analytic")
_SLACK = 1e-12


def bounds(parts: list[Part], delta: float, *, replace_one: bool = False) -> Epsilon | None:
    """Both sides of ε at ``delta``; None where there is no closed form."""
    if _total_variation(parts, 2.0 if replace_one else 1.0) <= delta * (1 - 1e-9):
        return _ZERO
    if len(parts) != 1 or parts[0].num_steps != 1:
        return None
    q, sigma, _ = parts[0]
    margin = one_step.margin(sigma)
    if margin > 1e-4:
        return None
    above = [
        one_step.curves(q, sigma, way)[0]
        for way in (("replace",) if replace_one else ("remove", "add"))
    ]

    def excess(epsilon: float) -> float:
        found = max(float(curve(epsilon)) for curve in above)
        return math.log(found / delta) if found > 0 else -math.inf

    return _around_root(excess, math.log1p(margin))


def never_sampled(charges: list[Charge], delta: float) -> Epsilon | None:
    """ε = 0 where a record enters no step with probability 1 - ``delta`` or more, else None.

    Whatever the noise: with ``1 - Π (1 - q_t) <= δ`` neighbours give the same output but for δ.
    ``Σ q_t`` is no smaller, and compared in exact arithmetic.
    """
    if any(charge.sampling_rate >= 1 for charge in charges):
        return None
    if sum(charge.num_steps * Fraction(charge.sampling_rate) for charge in charges) <= delta:
        return _ZERO
    missed = sum(charge.num_steps * math.log1p(-charge.sampling_rate) for charge in charges)
    return _ZERO if -math.expm1(missed) <= delta * (1 - _SLACK) else None


def _around_root(excess: Callable[[float], float], margin: float) -> Epsilon | None:
    if excess(0.0) <= -margin:
        return _ZERO
    high = 1e-3
    while excess(high) > -1.0:
        high *= 2
        if high > 1e300:
            return None
    root = brentq(lambda e: max(excess(e), -1.0), 0.0, high, xtol=1e-300, rtol=1e-14)
    lower = upper = root
    step = 1e-13
    while excess(upper) > -margin:
        upper, step = root * (1 + step), 2 * step
    step = 1e-13
    while lower > 0 and excess(lower) < margin:
        lower, step = max(0.0, root * (1 - step)), 2 * step
    return Epsilon(lower, root, upper, "analytic")


def _total_variation(parts: list[Part], distance: float) -> float:
    log_same = 0.0
    for q, sigma, num_steps in parts:
        apart = q * (1 - 2 * float(ndtr(-distance / sigma / 2)))
        if apart >= 1:
            return 1.0
        log_same += num_steps * math.log1p(-apart)
    return -math.expm1(log_same)
