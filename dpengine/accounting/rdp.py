"""An upper bound of ε by Rényi divergences: loose by a tenth or a third, and always there.

Mironov, Talwar and Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv
1908.10530. For add-remove and for zero-out adjacency.
"""

import math

import numpy as np
from scipy.special import gammaln, logsumexp

from .charges import Part

_FRACTIONAL = np.concatenate([np.arange(1.01, 1.1, 0.01), np.arange(1.1, 10.95, 0.1)])
_INTEGER = np.unique(np.concatenate([np.arange(2, 65), np.geomspace(65, 20_000, 60).astype(int)]))
_MANY = 20
_MAX_POINTS = 30_000


def upper(parts: list[Part], delta: float) -> float:
    """The least bound of ε over many orders; infinite where there is none.

    Divergences of one order add up over adaptive composition. Order α with divergence ρ gives
    ``ε = ρ + ln(1 - 1/α) - ln(α δ)/(α - 1)`` (Canonne, Kamath, Steinke, arXiv 2004.00010,
    proposition 12). Fractional orders are left out where there are many ``parts``.
    """
    fractional = _FRACTIONAL if len(parts) <= _MANY else _FRACTIONAL[:0]
    orders = np.concatenate([fractional, _INTEGER])
    rho = np.zeros(len(orders))
    with np.errstate(over="ignore", invalid="ignore"):
        for q, sigma, num_steps in parts:
            moments = [log_moment(q, sigma, order) for order in fractional]
            moments += [log_moment_of_integer(q, sigma, int(order)) for order in _INTEGER]
            rho += num_steps * np.array(moments) / (orders - 1)
        epsilon = rho + np.log1p(-1 / orders) - np.log(orders * delta) / (orders - 1)
    epsilon = epsilon[np.isfinite(epsilon)]
    return max(float(epsilon.min()), 0.0) if len(epsilon) else math.inf


def log_moment(q: float, sigma: float, order: float) -> float:
    """``ln E (1 - q + q e^L)^α`` of a standard Gaussian's loss L, α any number above 1.

    L = (2z - 1)/(2σ²) with z normal of variance σ² (equation 4 of the source; the other direction
    has no larger divergence, its theorem 5). The integral is a sum over a grid of step
    h <= min(σ/16, σ²/4): the integrand f is analytic for |Im z| < π σ², where
    |f(x + iy)| <= exp(y²/(2σ²)) f(x), so the sum is off by less than 3 exp(y²/(2σ²) - 2π y/h) of
    its value, below 1e-31 at y = min(3σ/4, 3σ²). Beyond b σ + α to the right, b² = 196 + 2α ln 1/q,
    and beyond -14 σ to the left less than 1e-40 of it is lost. Infinite, which is a bound, where σ
    is so small that the grid would have more than 30,000 points.
    """
    if q == 1:
        return order * (order - 1) / (2 * sigma**2)
    step = min(sigma / 16, sigma**2 / 4)
    reach = math.sqrt(196 - 2 * order * math.log(q))
    if not (reach + 14) * sigma + order < _MAX_POINTS * step:
        return math.inf
    z = np.arange(-14 * sigma, reach * sigma + order + step, step)
    loss = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    density = math.log(step / (sigma * math.sqrt(2 * math.pi))) - z**2 / (2 * sigma**2)
    return float(logsumexp(order * loss + density))


def log_moment_of_integer(q: float, sigma: float, order: int) -> float:
    """The same for a whole α:  ln Σ_k C(α, k) (1 - q)^(α - k) q^k exp((k² - k)/(2σ²))."""
    if q == 1:
        return order * (order - 1) / (2 * sigma**2)
    k = np.arange(order + 1)
    chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    weights = (order - k) * math.log1p(-q) + k * math.log(q)
    return float(logsumexp(chosen + weights + (k**2 - k) / (2 * sigma**2)))
