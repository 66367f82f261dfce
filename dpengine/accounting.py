"""Accounting: what a plan costs, and how much noise a budget needs.

The composition is computed by prv-accountant (Gopi, Lee, Wutschitz, "Numerical Composition of
Differential Privacy", arXiv 2106.02848), which returns bounds; only its upper bound is ever
compared with a budget.
"""

import hashlib
import json
import math
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy.optimize import brentq
from scipy.stats import ncx2, norm

from .errors import positive, positive_int, probability
from .plan import PrivacyPlan
from .secure_random import MAX_GAUSSIAN

EPS_ERROR = 0.002
"""Half the width of the interval that the accountant certifies around its estimate."""

_COARSE_EPS_ERROR = 0.05
_MAX_NOISE_MULTIPLIER = 1e5
_MAX_CERTIFICATIONS = 30


class AccountingError(ValueError):
    """The accountant cannot certify a number for this setting."""


class Charge(NamedTuple):
    """``num_steps`` Gaussian mechanisms with Poisson subsampling; a rate of 1 is none.

    noised_values: how many values each of them noises, for the tail of the generator.
    """

    sampling_rate: float
    noise_multiplier: float
    num_steps: int
    noised_values: int


class Epsilon(NamedTuple):
    """Certified bounds of ε around an estimate. The claim is always ``upper``."""

    lower: float
    estimate: float
    upper: float


def compute_epsilon(
    sampling_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    *,
    eps_error: float = EPS_ERROR,
) -> Epsilon:
    """ε of ``num_steps`` Poisson-subsampled Gaussian mechanisms at ``delta``.

    Holds for add-remove and for zero-out adjacency alike. The tail that the sampler of the noise
    cuts is not in ``delta``: subtract ``noise_tail_delta`` first.

    Raises AccountingError where the accountant cannot certify a number.
    """
    charge = Charge(sampling_rate, noise_multiplier, num_steps, noised_values=1)
    return _composed([charge], delta, eps_error)


def _composed(charges: list[Charge], delta: float, eps_error: float) -> Epsilon:
    """ε of all of ``charges`` together; their tails are not in ``delta``."""
    positive(delta=delta)
    prvs, steps, full = [], [], 0.0
    for charge in charges:
        probability(sampling_rate=charge.sampling_rate)
        positive(noise_multiplier=charge.noise_multiplier)
        positive_int(num_steps=charge.num_steps)
        if charge.sampling_rate == 1:
            full += charge.num_steps / charge.noise_multiplier**2
            continue
        prvs.append(
            PoissonSubsampledGaussianMechanism(
                sampling_probability=charge.sampling_rate, noise_multiplier=charge.noise_multiplier
            )
        )
        steps.append(charge.num_steps)
    if full > 0:
        # Gaussian mechanisms on all records are one with 1/σ² = Σ 1/σ_t², exactly.
        prvs.append(GaussianMechanism(noise_multiplier=1 / math.sqrt(full)))
        steps.append(1)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # The accountant overflows and underflows in the far tails and bounds what that costs.
            warnings.simplefilter("ignore")
            accountant = PRVAccountant(
                prvs=prvs,
                max_self_compositions=steps,
                eps_error=eps_error,
                delta_error=delta / 1000,
            )
            # Near 0 its interval reaches below; epsilon does not.
            bounds = Epsilon(
                *(max(float(e), 0.0) for e in accountant.compute_epsilon(delta, steps))
            )
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        raise _uncertified(*charges[0][:3], delta) from error
    if not (bounds.lower <= bounds.estimate <= bounds.upper < math.inf):
        raise _uncertified(*charges[0][:3], delta)
    return bounds


def _uncertified(q: float, sigma: float, num_steps: int, delta: float) -> AccountingError:
    return AccountingError(
        f"epsilon cannot be certified for sampling rate {q:.6g}, noise multiplier {sigma:.6g}, "
        f"{num_steps} steps and delta {delta:.3g}; choose an epsilon nearer to 1, a lower "
        "sampling rate, fewer steps, or a larger delta"
    )


def noise_tail_delta(
    sampling_rate: float, noise_multiplier: float, num_steps: int, trainable_parameters: int
) -> float:
    """What the cut tail of the noise adds to δ over all steps.

    Box-Muller draws pairs inside a disc of radius R = ``MAX_GAUSSIAN``. A record shifts the pairs
    by a_i standard deviations with Σ a_i² <= 1/σ², and a pair shifted by a leaves the disc of its
    neighbour with probability m(a). To first order m(a) is the mass of a crescent at the rim,
    a R √(2/π) φ(R); what it has beyond that grows at least as a², so it is largest when one pair
    takes the whole shift, where it is below ncx2.sf(R², 2, 1/σ²). The shifts of ⌈P/2⌉ pairs add up
    to at most √⌈P/2⌉/σ:  T q (ncx2.sf(R², 2, 1/σ²) + R √(2/π) √⌈P/2⌉ φ(R)/σ).
    """
    shift = 1 / noise_multiplier
    pairs = math.ceil(trainable_parameters / 2)
    rim = MAX_GAUSSIAN * math.sqrt(2 / math.pi * pairs) * norm.pdf(MAX_GAUSSIAN) * shift
    # Beyond 2 R nearly all of the mass is outside; the series of ncx2 ends before that.
    outside = ncx2.sf(MAX_GAUSSIAN**2, 2, shift**2) if shift < 2 * MAX_GAUSSIAN else 1.0
    return float(num_steps * sampling_rate * (outside + rim))


def spent(
    sampling_rate: float,
    noise_multiplier: float,
    num_steps: int,
    delta: float,
    trainable_parameters: int,
    *,
    eps_error: float = EPS_ERROR,
) -> Epsilon:
    """ε at the total ``delta``, the cut tail of the noise charged first. 0 steps spend nothing."""
    charge = Charge(sampling_rate, noise_multiplier, num_steps, trainable_parameters)
    return spent_together([charge], delta, eps_error=eps_error)


def spent_together(charges: list[Charge], delta: float, *, eps_error: float = EPS_ERROR) -> Epsilon:
    """ε of ``charges`` on one data set at the total ``delta``, the tails of their noise included.

    The mechanisms may be interleaved, and their queries chosen by what earlier ones gave out; their
    rates, noise and number must not be.
    """
    charges = [charge for charge in charges if charge.num_steps > 0]
    if not charges:
        return Epsilon(0.0, 0.0, 0.0)
    if any(charge.noise_multiplier == 0 for charge in charges):
        return Epsilon(math.inf, math.inf, math.inf)
    tail = sum(noise_tail_delta(*charge) for charge in charges)
    if tail > delta / 1000:
        least = min(charge.noise_multiplier for charge in charges)
        raise AccountingError(
            f"the tail of the noise generator adds {tail:.2g} to delta, more than delta/1000 = "
            f"{delta / 1000:.2g}, at noise multiplier {least:.4g}; lower epsilon or the "
            "number of steps, or raise delta"
        )
    return _composed(charges, delta - tail, eps_error)


def plan_epsilon(
    plan: PrivacyPlan, num_steps: int | None = None, *, eps_error: float = EPS_ERROR
) -> Epsilon:
    """ε of ``num_steps`` steps of ``plan``, all of them by default, at the plan's δ."""
    return spent(
        plan.sampling_rate,
        plan.noise_multiplier,
        plan.num_steps if num_steps is None else num_steps,
        plan.delta,
        plan.noised_values,
        eps_error=eps_error,
    )


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sampling_rate: float,
    num_steps: int,
    trainable_parameters: int,
) -> float:
    """The least σ found whose certified upper ε, tail charged, is at most ``target_epsilon``.

    A coarse search on the accountant's estimate finds σ to 1e-4; certified evaluations at full
    precision then move it until the upper bound holds. The σ that is returned, a float that
    survives JSON unchanged, has itself been certified. ``target_epsilon`` infinite gives 0.

    Raises AccountingError where no σ can be certified.
    """
    if target_epsilon == math.inf:
        return 0.0
    positive(target_epsilon=target_epsilon, target_delta=target_delta)
    probability(sampling_rate=sampling_rate)
    positive_int(num_steps=num_steps, trainable_parameters=trainable_parameters)
    if target_epsilon <= 2 * EPS_ERROR:
        raise ValueError(
            f"target_epsilon must be above {2 * EPS_ERROR}, twice the accountant's resolution, got "
            f"{target_epsilon}"
        )
    setting = (sampling_rate, num_steps, target_delta, trainable_parameters)
    cache = _cache_file(target_epsilon, *setting)
    sigma = _read_cached(cache)
    if sigma is not None and _upper(sigma, *setting) <= target_epsilon:
        return sigma
    sigma = _coarse_noise_multiplier(target_epsilon - EPS_ERROR, *setting[:3])
    for _ in range(_MAX_CERTIFICATIONS):
        upper = _upper(sigma, *setting)
        if upper <= target_epsilon:
            _write_cached(cache, sigma)
            return sigma
        # Where the accountant has no answer, more noise may be needed to get one.
        sigma *= 1.0005 if upper < math.inf else 1.1
    raise _uncertified(sampling_rate, sigma, num_steps, target_delta)


def _upper(
    sigma: float, q: float, num_steps: int, delta: float, trainable_parameters: int
) -> float:
    try:
        return spent(q, sigma, num_steps, delta, trainable_parameters).upper
    except AccountingError:
        return math.inf


def _coarse_noise_multiplier(target: float, q: float, steps: int, delta: float) -> float:
    eps_error = min(_COARSE_EPS_ERROR, target / 10)

    def excess(log_sigma: float) -> float:
        try:
            bounds = compute_epsilon(q, math.exp(log_sigma), steps, delta, eps_error=eps_error)
        except AccountingError:
            return math.inf
        return bounds.estimate - target

    high = math.log(max(1.0, math.sqrt(steps) * q))
    while excess(high) > 0:
        high += 0.5
        if high > math.log(_MAX_NOISE_MULTIPLIER):
            raise _uncertified(q, math.exp(high), steps, delta)
    low = high - 0.5
    while excess(low) < 0:
        high, low = low, low - 0.5
    return _least_certifiable(excess, low, high)


def _least_certifiable(excess, low: float, high: float) -> float:
    # Bisection until the accountant answers at both ends, then a faster root finder.
    while math.isinf(excess(low)) and high - low > 1e-4:
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    if math.isinf(excess(low)):
        return math.exp(high)
    return math.exp(brentq(excess, low, high, xtol=1e-4))


def _cache_file(*setting: float) -> Path:
    key = json.dumps([*setting, EPS_ERROR, MAX_GAUSSIAN, version("prv-accountant")])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return root / "dpengine" / "noise_multiplier" / f"{name}.json"


def _read_cached(file: Path) -> float | None:
    # A cached value is only a first guess: it is certified again before it is used.
    try:
        sigma = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return sigma if isinstance(sigma, float) and 0 < sigma < _MAX_NOISE_MULTIPLIER else None


def _write_cached(file: Path, sigma: float) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(sigma))
    except OSError:
        # Without a cache the next run searches again; nothing else depends on it.
        return
