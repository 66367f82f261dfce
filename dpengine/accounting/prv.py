"""Bounds of ε from both sides by prv-accountant, where its grid is small enough to wait for.

Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy", arXiv 2106.02848. For
add-remove and for zero-out adjacency.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from prv_accountant import PRVAccountant
from prv_accountant.accountant import compute_safe_domain_size
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

    def probability(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """P[left < loss <= right] of adjacent intervals."""
        return np.diff(self.cdf(np.append(left, right[-1])))

    def rdp(self, order: float) -> float:
        """The Rényi divergence, from which the package takes how far its grid must reach."""
        return rdp.log_moment(self.sampling_rate, self.noise_multiplier, order) / (order - 1)


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
    if len(parts) > _MAX_PARTS or rounding > delta / 100:
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
            accountant = PRVAccountant(
                prvs=losses,
                max_self_compositions=steps,
                eps_error=eps_error,
                delta_error=delta_error,
                eps_max=reach,
            )
            composed = accountant.compute_composition(steps)
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
    and a composed distribution over a range of w standard deviations has an ℓ1 norm of at most
    2 √w times its share of ℓ2: with w below 64 and n below 2³², at most 2⁻⁵⁰ (T + 32).
    """
    return 2**-50 * (num_steps + 32)
