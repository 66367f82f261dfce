"""Bounds of ε from both sides by prv-accountant, where its grid is small enough to wait for.

Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy", arXiv 2106.02848. For
add-remove and for zero-out adjacency.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from prv_accountant.accountant import compute_safe_domain_size
from prv_accountant.composers import Heterogeneous
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from scipy.special import ndtr

from . import rdp
from .charges import Epsilon, Part

_MAX_NODES = 2**20
"""Nodes of all parts together: a microsecond and a hundred bytes each."""

_MAX_PARTS = 16


@dataclass(frozen=True)
class PrivacyLoss:
    """The loss ``ln(1 - q + q e^L)`` of one step with a record, L = (2z - 1)/(2σ²).

    z is from ``(1 - q) N(0, σ²) + q N(1, σ²)``; with removal and addition swapped it costs no more.
    What the package asks of a privacy random variable, in float64: its own class computes in long
    double, which takes five times as long and ends in a float64 ``erfc`` all the same.
    """

    sampling_rate: float
    noise_multiplier: float
    pm_inf = 0.0

    def cdf(self, loss: np.ndarray | float) -> np.ndarray:
        """P[loss <= t]. ``expm1`` and ``log1p`` keep what small rates would cancel."""
        q, sigma = self.sampling_rate, self.noise_multiplier
        loss = np.asarray(loss, dtype=np.float64)
        if q == 1:
            scaled = sigma * loss
        else:
            ratio = np.expm1(loss) / q
            scaled = sigma * np.log1p(np.where(ratio > -1, ratio, -1.0))
        unsampled = (1 - q) * ndtr(scaled + 1 / (2 * sigma)) if q < 1 else 0.0
        return unsampled + q * ndtr(scaled - 1 / (2 * sigma))

    def rdp(self, order: float) -> float:
        """The Rényi divergence, from which the package takes how far its grid must reach."""
        return rdp.log_moment(self.sampling_rate, self.noise_multiplier, order) / (order - 1)


@dataclass(frozen=True)
class Truncated:
    """A privacy loss given that it lies within the grid, with its mean.

    The package integrates the distribution function for the mean and may step over its kink at
    ln(1 - q): at q = 0.11, σ = 1.1 its mean is 4 % too high, and it then refuses the grid. Here it
    is a sum over z, exact to rounding as in ``rdp.log_moment``, of the loss before truncation: what
    lies outside has less mass than δ/40,000 over all steps.
    """

    loss: PrivacyLoss
    left: float
    right: float
    pm_inf = 0.0

    def mean(self) -> float:
        """E of the loss."""
        q, sigma = self.loss.sampling_rate, self.loss.noise_multiplier
        if q == 1:
            return 1 / (2 * sigma**2)
        step = min(sigma / 16, sigma**2 / 4)
        z = np.arange(-14 * sigma, 14 * sigma + 1 + step, step)
        ratio = (2 * z - 1) / (2 * sigma**2)
        loss = np.logaddexp(math.log1p(-q), math.log(q) + ratio)
        weight = np.exp(-(z**2) / (2 * sigma**2) + loss) / (sigma * math.sqrt(2 * math.pi))
        return float(np.sum(weight * loss) * step)

    def probability(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """P[left < loss <= right] of adjacent intervals."""
        edges = np.clip(np.append(left, right[-1]), self.left, self.right)
        mass = self.loss.cdf(self.right) - self.loss.cdf(self.left)
        return np.diff(self.loss.cdf(edges)) / mass


def bounds(
    parts: list[Part], delta: float, eps_error: float, *, coarser: bool = False
) -> Epsilon | None:
    """ε within ``eps_error``; None where the package has no answer or would need too large a grid.

    ``coarser`` widens the error until the grid is small enough. The size of the grid is known
    before it is filled: reach over mesh, by theorem 5.5 and remark 5.6 of the source. Rounding is
    charged to δ as in ``transform_rounding``.
    """
    delta_error, steps = delta / 5000, [part.num_steps for part in parts]
    rounding = transform_rounding(sum(steps))
    if len(parts) > _MAX_PARTS or rounding > delta / 3:
        return None
    losses = [PrivacyLoss(part.sampling_rate, part.noise_multiplier) for part in parts]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # The package overflows and underflows in the far tails and bounds what that costs.
            warnings.simplefilter("ignore")
            reach = compute_safe_domain_size(losses, steps, eps_error, delta_error)
            mesh = 1 / math.sqrt(sum(steps) / 2 * math.log(12 / delta_error))
            least = 2 * reach / mesh * len(parts) / _MAX_NODES
            if not least <= eps_error:
                if not (coarser and math.isfinite(least)):
                    return None
                eps_error = least
            domain = Domain.create_aligned(-reach, reach, eps_error * mesh)
            within = [Truncated(loss, domain.t_min(), domain.t_max()) for loss in losses]
            discrete = [CellCentred().discretise(loss, domain) for loss in within]
            composed = Heterogeneous(discrete).compute_composition(steps)
            answer = composed.compute_epsilon(delta, delta_error + rounding, eps_error)
    except (RuntimeError, ValueError, ArithmeticError, MemoryError, AssertionError):
        return None
    # Near 0 its interval reaches below; epsilon does not.
    lower, estimate, upper = (max(float(e), 0.0) for e in answer)
    if not lower <= estimate <= upper < math.inf:
        return None
    return Epsilon(lower, estimate, upper, "prv")


def transform_rounding(num_steps: int) -> float:
    """What float64 may misplace of the mass when a distribution is composed by Fourier transform.

    A transform errs by about log2(n) 2⁻⁵³ of the ℓ2 norm, a T-th power by T 2⁻⁵² of each factor,
    and over a range of w standard deviations an error has an ℓ1 norm of at most 2 √w times its
    share of the ℓ2 norm of the composed distribution: with w below 4096 and n below 2³², at most
    2⁻⁴⁷ (T + 32). Losses of small rates and noise have a wider range, far out in an almost empty
    tail; there the same charge is an estimate, which no comparison has contradicted.
    """
    return 2**-47 * (num_steps + 32)
