"""An upper bound of ε by the library dp-accounting: the second opinion where PRV has none.

Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, "Connect the Dots", arXiv 2207.04380: losses are
moved to a grid so that the result dominates the mechanism at every ε. The error is of second order
in the grid's step. Idea and bound are those of ``pld``, the code is another's from the curve of one
step to the composition, which is not tilted: below δ of 1e-10 or so its rounding is too much.
"""

import math
import warnings

import numpy as np

from .charges import Part
from .prv import transform_rounding

_SHARE = 0.05
"""Grid step over the standard deviation of one step's loss: adds _SHARE²/4 to the variance."""

_MAX_GRID = 0.01
_MAX_SHIFT = 1e-4
_MAX_NODES = 120_000
_MAX_COMPOSED = 2e6
_MAX_PARTS = 30
_TRUNCATION = 10.2
"""Standard deviations at which the library cuts the noise: a mass of e⁻⁵⁰ a step, charged."""


def upper(
    parts: list[Part], delta: float, epsilon: float, *, replace_one: bool = False
) -> float | None:
    """A bound of ε; None where float64 or the time for it does not suffice.

    epsilon: some upper bound, from which the grid is chosen. ``replace_one`` takes the pair of
    mixtures of ``composition``, otherwise the worse of adding and removing a record.

    A step h of the grid adds at most h²/4 to the variance of a step's loss and h²/8 to its mean. So
    h is at most a twentieth of the standard deviation, and all steps together move the mean by at
    most 1e-4 of ε; finer grids would only collect rounding, which is charged to δ.
    """
    num_steps = sum(part.num_steps for part in parts)
    rounding = transform_rounding(num_steps)
    # A third of δ is below one part in a hundred of ε where δ is as small as that makes it.
    if len(parts) > _MAX_PARTS or rounding > delta / 3:
        return None
    grid = _grid(parts, num_steps, epsilon)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            loss = _composed(parts, grid, min(1e-15, delta / 1e6), replace_one)
            bound = float(loss.get_epsilon_for_delta(delta - rounding))
    except (RuntimeError, ValueError, ArithmeticError, MemoryError):
        return None
    return bound if 0 <= bound < math.inf else None


def _grid(parts: list[Part], num_steps: int, epsilon: float) -> float:
    variance = spread = 0.0
    for q, sigma, n in parts:
        # χ² is the variance of the likelihood ratio, and nearly that of a small loss.
        variance += n * q**2 * math.expm1(min(sigma**-2, 50.0))
        furthest = _TRUNCATION / sigma + sigma**-2
        spread += math.log1p(q * math.expm1(min(furthest, 700.0))) + max(furthest - 700.0, 0.0)
        spread += furthest if q == 1 else -math.log1p(-q)
    claim = max(1.0, epsilon if math.isfinite(epsilon) else 1.0)
    wanted = min(
        _MAX_GRID,
        _SHARE * math.sqrt(variance / num_steps),
        math.sqrt(8 * _MAX_SHIFT * claim / num_steps),
    )
    return max(wanted, spread / _MAX_NODES, 4 * claim / _MAX_COMPOSED)


def _composed(parts: list[Part], grid: float, tail: float, replace_one: bool):
    # A second opinion alone needs it, and it takes long to import.
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    relation = dp_accounting.NeighboringRelation
    total = None
    for q, sigma, num_steps in parts:
        loss = privacy_loss_distribution.from_gaussian_mechanism(
            sigma,
            value_discretization_interval=grid,
            sampling_prob=q,
            neighboring_relation=relation.REPLACE_ONE if replace_one else relation.REPLACE_SPECIAL,
        ).self_compose(num_steps, tail)
        total = loss if total is None else total.compose(loss, tail)
    return total
