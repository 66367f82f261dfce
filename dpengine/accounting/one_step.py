"""δ at each ε of one step, in closed form.

a is 1/σ, the shift of the sum over the standard deviation of its noise, and
``G(x) = Φ(-x) - e^(a x + a²/2) Φ(-x - a)`` the δ of N(a, 1) against N(0, 1) at the ε of which x is
the least output that tells: ε = a x + a²/2 (Balle and Wang, arXiv 1805.06530). With
f = N(0, 1), g = N(a, 1) and a sampling rate q, for ε >= 0:

- **remove**: (1-q) f + q g against f. ``(1-q) f + q g - e^ε f = q (g - e^ε' f)`` with
  ``e^ε' = 1 + (e^ε - 1)/q``: q times G.
- **add**: f against (1-q) f + q g. ``f - e^ε ((1-q) f + q g) = c (f - e^ε" g)`` with
  ``c = 1 - e^ε (1-q)`` and ``e^ε" = e^ε q/c``: c times G, and 0 where c <= 0.
- **replace**: (1-q) f + q g against (1-q) f + q g', g' = N(-a, 1). They differ by e^ε at the z with
  ``sinh(a z - ε/2) = e^(a²/2) sinh(ε/2) (1-q)/q``. Above it the difference is that of q g and
  q e^(a z - a²/2) f, and that of e^ε q e^(-a z - a²/2) f and e^ε q g', which are G at z - a and z.

Rounding. ``G(x) = ½ e^(-x²/2) (erfcx(x/√2) - erfcx((x + a)/√2))``. scipy's erfcx is right to some
ulp u; the difference loses a factor of at most 1 + (1 + x)/a of them; x = ε/a - a/2 is right to
some u (x + a), which the exponential multiplies by x. Beyond x = 38 everything is 0. So G, and the
sums of positive terms that it enters, are right to ``margin``. The zero of c, in which the curve of
adding ends, is right to some u ε.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from scipy.special import erfcx, ndtr

Direction = Literal["remove", "add", "replace"]
Curve = Callable[[np.ndarray], np.ndarray]


def curves(q: float, sigma: float, direction: Direction) -> tuple[Curve, Curve]:
    """δ as a function of ε >= 0, and that of the pair with its two sides swapped."""
    shift = 1 / sigma
    remove, add, replace = (partial(curve, q, shift) for curve in (_remove, _add, _replace))
    return {"remove": (remove, add), "add": (add, remove), "replace": (replace, replace)}[direction]


def margin(sigma: float) -> float:
    """Relative error of a curve, with room: 1e-9 in ordinary settings."""
    return 1e-9 + 1e-12 * (sigma + 1 / sigma)


def gaussian(shift: float, x: np.ndarray) -> np.ndarray:
    """G of the module's text."""
    x = np.asarray(x, dtype=np.float64)
    half = 0.5 * np.exp(-(x**2) / 2)
    far = erfcx((x + shift) / math.sqrt(2))
    near = erfcx(np.maximum(x, 0.0) / math.sqrt(2))  # erfcx overflows far below 0
    return np.where(x < 0, ndtr(-x) - half * far, half * (near - far))


def _of_epsilon(shift: float, epsilon: np.ndarray) -> np.ndarray:
    return gaussian(shift, epsilon / shift - shift / 2)


def _remove(q: float, shift: float, epsilon: np.ndarray) -> np.ndarray:
    if q == 1:
        return _of_epsilon(shift, epsilon)
    inner = np.where(
        epsilon < 700, np.log1p(np.expm1(np.minimum(epsilon, 700)) / q), epsilon - math.log(q)
    )
    return q * _of_epsilon(shift, inner)


def _add(q: float, shift: float, epsilon: np.ndarray) -> np.ndarray:
    if q == 1:
        return _of_epsilon(shift, epsilon)
    share = -np.expm1(epsilon + math.log1p(-q))
    inner = epsilon + math.log(q) - np.log(np.maximum(share, 1e-300))
    return np.where(share > 0, share * _of_epsilon(shift, inner), 0.0)


def _replace(q: float, shift: float, epsilon: np.ndarray) -> np.ndarray:
    if q == 1:
        return _of_epsilon(2 * shift, epsilon)
    log_ratio = shift**2 / 2 + math.log1p(-q) - math.log(q)
    half = epsilon / 2
    with np.errstate(divide="ignore"):  # -inf at ε = 0
        log_sinh = half + np.log(-np.expm1(-epsilon)) - math.log(2)
    at = log_ratio + np.where(epsilon > 0, log_sinh, -np.inf)
    small = np.arcsinh(np.exp(np.minimum(at, 1.0)))
    large = at + np.log1p(np.sqrt(1 + np.exp(-2 * np.maximum(at, 1.0))))
    z = (half + np.where(at > 1, large, small)) / shift
    other = np.exp(epsilon - shift * z - shift**2 / 2) * gaussian(shift, z)
    return q * (gaussian(shift, z - shift) + other)
