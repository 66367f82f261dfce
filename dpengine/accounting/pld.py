"""An upper bound of ε by privacy loss distributions, at any δ, for all three adjacencies.

Three steps, each of which can only raise the bound:

1. **The curve of one step.** Its δ at each ε has a closed form (``one_step``). Between the points
   of a grid of step h it is replaced by straight lines in e^ε, which lie above it as it is convex,
   and belong to losses on the grid: Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, "Connect the
   Dots", arXiv 2207.04380. At order λ that multiplies ``E e^(λ L)`` by at most 1 + λ (λ + 1) h²/8,
   and so moves ε by about T (λ + 1) h²/8. Curves that lie above others do so composed as well.
2. **Composition.** The Fourier transform of the losses, to the power T. A transform errs by a share
   of the largest masses, and δ is far out in the tail: so each mass is first multiplied by
   ``e^(λ l)``, with the λ of Chernoff's bound, which moves the bulk to where ε is. Multiplied back,
   the error is a share of δ itself. Masses that the transform's window wraps around are added
   where they should not be, which raises δ, or they are charged.
3. **Rounding.** In float64, u = 2⁻⁵³. The curve is multiplied by 1 + its relative error
   (``one_step.margin``), and each mass, a difference of two terms, gets 4 u of both on top. That
   the sum of the masses is then above 1 does no harm: for any positive masses
   ``δ_A(x) = Σ_l p_A(l) max(0, 1 - x/e^l)`` and ``δ_(A*B)(x) = Σ_l p_B(l) δ_A(x/e^l)``, which grows
   with the curve of either, so that a curve above another at every x > 0 stays above it, composed
   with whatever. A tilted mass is right to 2 u of its exponent, which T steps multiply by T and
   ``drift`` holds. A transform of n points errs by at most 8 u log2(n) of the ℓ2 norm (Higham,
   "Accuracy and Stability of Numerical Algorithms", theorem 24.2), a T-th power by 8 u T of each
   factor, no factor being above 1 by more than the rounding of the tilted sum, which is in
   ``drift``: together by ``2⁻⁴⁹ (T + 1) (log2(n) + 4)`` of the ℓ2 norm of one step, which becomes a
   δ by Cauchy and Schwarz, and is charged.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import fft

from . import one_step
from .charges import Part

_FIRST_NODES = 2**13
_MAX_NODES = 2**22
_MAX_PARTS = 60
_LEFT_OUT = 1e-6
"""Share of δ that may be given to losses beyond the grid."""

_MOST_TILTED = 20.0
"""Order times grid step, above which the tilted losses are but one point."""

_OUTSIDE = 45.0
"""e to the minus this is the mass outside the window of a transform."""


@dataclass(frozen=True)
class Losses:
    """Masses of one step on the grid ``step * (first + i)``, and what is beyond it.

    Composed ``times`` times.
    """

    first: int
    masses: np.ndarray
    infinite: float
    times: int


def upper(
    parts: list[Part], delta: float, *, replace_one: bool = False, tolerance: float = 8e-4
) -> float | None:
    """A bound of ε at ``delta``, at most about ``tolerance`` of ε too high.

    None where float64, or a grid of a size that one would wait for, does not suffice.
    """
    if len(parts) > _MAX_PARTS:
        return None
    found = 0.0
    with np.errstate(all="ignore"):
        for way in ("replace",) if replace_one else ("remove", "add"):
            bound = _of_direction(parts, delta, way, tolerance, found)
            if bound is None:
                return None
            found = max(found, bound)
    return found


def _of_direction(
    parts: list[Part],
    delta: float,
    direction: one_step.Direction,
    tolerance: float,
    enough: float,
) -> float | None:
    """ε of one direction. A bound of ``enough`` or less is not made finer."""
    num_steps = sum(part.num_steps for part in parts)
    ranges = [_range(part, delta, num_steps, direction) for part in parts]
    if not all(math.isfinite(low) and math.isfinite(high) for low, high in ranges):
        return None
    widest = max(high - low for low, high in ranges)
    step, epsilon = widest / _FIRST_NODES, None
    for _ in range(4):
        losses = [_losses(part, step, *r, direction) for part, r in zip(parts, ranges, strict=True)]
        order = _order(losses, step, delta)
        simple = _chernoff(losses, step, order, delta)
        if simple <= enough:
            return simple
        found = _composed(losses, step, order, delta)
        if found is not None:
            epsilon = found if epsilon is None else min(epsilon, found)
            if epsilon <= enough:
                return epsilon
        guess = max(simple if found is None else found, 1e-12)
        # Half of the step's effect to first order, as λ and ε are still those of a coarser grid.
        wanted = math.sqrt(4 * tolerance * guess / (num_steps * (order + 1)))
        if found is not None and step <= 1.01 * wanted:
            return epsilon
        finest = max(widest, _width(losses, step, order)) / _MAX_NODES
        if step <= 1.01 * finest:
            return epsilon
        step = max(min(wanted, step), finest) if found is not None else max(wanted, finest)
    return epsilon


def _range(
    part: Part, delta: float, num_steps: int, direction: one_step.Direction
) -> tuple[float, float]:
    """Losses beyond which, over all steps, next to nothing of δ and of the mass lies."""

    def furthest(curve, share):
        far = 1e-9
        while curve(np.array([far]))[0] > share:
            far *= 1.5
            if far > 1e12:
                return math.inf
        return far

    above, below = one_step.curves(part.sampling_rate, part.noise_multiplier, direction)
    high = furthest(above, _LEFT_OUT * delta / num_steps)
    low = furthest(lambda eps: np.exp(-eps) * below(eps), 1e-10 / num_steps)
    return -low, high


def _losses(
    part: Part, step: float, low: float, high: float, direction: one_step.Direction
) -> Losses:
    """The lines between the points of the curve, as masses on the grid.

    With x = e^ε, lines with slopes s_j from x_j to x_(j+1) are ``Σ_j p_j max(0, 1 - x/x_j)`` for
    ``p_j = x_j (s_j - s_(j-1))``. Below ε = 0 the curve is 1 - x and a remainder, e^ε times the
    other direction's δ at -ε; 1 - x being straight but at x = 1, the masses come from the remainder
    and, at ε = 0, from a bend of 1.
    """
    above, below = one_step.curves(part.sampling_rate, part.noise_multiplier, direction)
    first, last = -max(1, math.ceil(-low / step)), max(1, math.ceil(high / step))
    grid = step * np.arange(first, last + 1)
    curve = np.empty(len(grid))
    curve[-first:] = above(grid[-first:])
    curve[:-first] = np.exp(grid[:-first]) * below(-grid[:-first])
    curve *= 1 + one_step.margin(part.noise_multiplier)
    falls = -np.diff(curve, prepend=0.0, append=curve[-1])
    left, right = falls[:-1] / -math.expm1(-step), falls[1:] / math.expm1(step)
    left[0] = -curve[0]  # beyond the first point the remainder is a line to 0 at x = 0
    masses = left - right
    masses[-first] += 1.0
    masses = np.maximum(masses, 0.0) + 2.0**-51 * (np.abs(left) + np.abs(right))
    masses[-first] += 2.0**-51
    return Losses(first, masses, float(curve[-1]), part.num_steps)


def _log_moments(losses: Losses, step: float, order: float) -> tuple[float, float, float]:
    """``ln E e^(λ l)`` of one step, the mean and the variance of l when tilted by it."""
    grid = step * (losses.first + np.arange(len(losses.masses)))
    exponent = order * grid
    reference = float(exponent.max(where=losses.masses > 0, initial=-math.inf))
    weights = losses.masses * np.exp(np.minimum(exponent - reference, 0.0))
    total = float(weights.sum())
    mean = float(weights @ grid) / total
    variance = float(weights @ (grid - mean) ** 2) / total
    return math.log(total) + reference, mean, variance


def _order(losses: list[Losses], step: float, delta: float) -> float:
    """λ with ``T (K(λ) - λ K'(λ)) = ln δ``: Chernoff's bound of δ at ε = T K'(λ)."""

    def excess(order):
        terms = [(item.times, *_log_moments(item, step, order)) for item in losses]
        return sum(n * (moment - order * mean) for n, moment, mean, _ in terms) - math.log(delta)

    low, high = 1e-9, 1.0
    while excess(high) > 0 and high < _MOST_TILTED / step:
        low, high = high, 4 * high
    while high > 1.05 * low and high > 1e-8:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _chernoff(losses: list[Losses], step: float, order: float, delta: float) -> float:
    """ε at which ``E e^(λ (L - ε))``, which is above δ at ε, is ``delta``; its rounding added."""
    delta -= _beyond(losses)
    if not delta > 0:
        return math.inf
    moment = sum(item.times * _log_moments(item, step, order)[0] for item in losses)
    num_steps = sum(item.times for item in losses)
    return (moment - math.log(delta) + 1e-12 * num_steps) / order


def _beyond(losses: list[Losses]) -> float:
    """Probability of a loss beyond the grid in some step."""
    return -math.expm1(sum(item.times * math.log1p(-item.infinite) for item in losses))


def _window(losses: list[Losses], step: float, order: float) -> tuple[float, float]:
    """Ends between which the tilted sum lies but for e^-45 on either side (Chernoff's bound)."""
    terms = [(item, *_log_moments(item, step, order)) for item in losses]
    deviation = math.sqrt(sum(i.times * variance for i, _, _, variance in terms)) + step
    ends = []
    for sign in (-1, 1):
        ends_of = [i.first + (len(i.masses) - 1 if sign > 0 else 0) for i in losses]
        best = step * sum(i.times * end for i, end in zip(losses, ends_of, strict=True))
        for share in (0.3, 1.0, 2.0, 4.0, 9.0):
            tilt = sign * share / deviation
            moment = sum(
                i.times * (_log_moments(i, step, order + tilt)[0] - at) for i, at, _, _ in terms
            )
            end = (moment + _OUTSIDE) / tilt
            best = min(best, end) if sign > 0 else max(best, end)
        ends.append(best)
    return ends[0], ends[1]


def _width(losses: list[Losses], step: float, order: float) -> float:
    low, high = _window(losses, step, order)
    return high - low


def _composed(losses: list[Losses], step: float, order: float, delta: float) -> float | None:
    """ε of the losses together; None where the window is too large or rounding too much of δ."""
    low, high = _window(losses, step, order)
    first = math.floor(low / step) - 1
    size = math.ceil(high / step) + 2 - first
    if not size <= 4 * _MAX_NODES:
        return None
    n = fft.next_fast_len(size, real=True)
    log_moment, norm, transform, drift = 0.0, 0.0, 1.0, 1e-8
    for item in losses:
        moment, *_ = _log_moments(item, step, order)
        grid = step * (item.first + np.arange(len(item.masses)))
        tilted = item.masses * np.exp(order * grid - moment)
        drift += 2.0**-51 * item.times * (order * float(np.abs(grid).max()) + abs(moment) + 256)
        norm = max(norm, float(np.linalg.norm(tilted)))
        wrapped = np.bincount(np.arange(len(tilted)) % n, weights=tilted, minlength=n)
        transform = transform * _power(fft.rfft(wrapped), item.times)
        log_moment += item.times * moment
    start = sum(item.times * item.first for item in losses)
    masses = np.roll(fft.irfft(transform, n), (start - first) % n)
    num_steps = sum(item.times for item in losses)
    rounding = 2.0**-49 * (num_steps + 1) * (math.log2(n) + 4) * norm
    rest = delta - _beyond(losses)
    return _epsilon(np.maximum(masses, 0.0), step, first, order, log_moment, rounding, drift, rest)


def _power(transform: np.ndarray, exponent: int) -> np.ndarray:
    return np.exp(exponent * np.log(np.abs(transform)) + 1j * (exponent * np.angle(transform)))


def _epsilon(
    masses: np.ndarray,
    step: float,
    first: int,
    order: float,
    log_moment: float,
    rounding: float,
    drift: float,
    delta: float,
) -> float | None:
    """The least ε at which ``Σ_(l > ε) (1 - e^(ε - l)) e^(-λ l) masses e^K`` is within ``delta``.

    Everything is a share of ``delta``, about the loss at which Chernoff's bound is ``delta``.
    rounding: the ℓ2 error of ``masses``; drift: the relative error of each.
    """
    if not delta > 0:
        return None
    about = (log_moment - math.log(delta)) / order
    losses = step * (first + np.arange(len(masses))) - about
    keep = np.searchsorted(losses, -600 / (order + 1))
    losses, masses = losses[keep:], masses[keep:]
    if len(losses) < 2:
        return None
    slack = 1 + drift
    above = np.cumsum((masses * np.exp(-order * losses))[::-1])[::-1] * slack
    lost = np.cumsum((masses * np.exp(-(order + 1) * losses))[::-1])[::-1] / slack
    error = np.exp(-order * losses) * rounding / math.sqrt(-math.expm1(-2 * order * step))
    error += math.exp(-order * losses[-1] - _OUTSIDE)
    shares = above - np.exp(losses) * lost + error
    within = np.flatnonzero(shares <= 1)
    if len(within) == 0:
        return None
    at = int(within[0])
    if at > 0:
        # Between two points of the grid δ is a line in e^ε.
        log_epsilon = math.log(max(above[at] + error[at - 1] - 1, 1e-300) / lost[at])
        found = about + min(max(log_epsilon, losses[at - 1]), losses[at])
    else:
        found = about + losses[0]
    return max(0.0, float(found + 1e-12 * abs(found)))
