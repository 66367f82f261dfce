"""How much noise a budget needs."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from scipy.optimize import brentq

from ..errors import positive, positive_int, probability
from ..mechanism.plan import Adjacency
from ..mechanism.secure_random import MAX_GAUSSIAN
from . import pld
from .charges import AccountingError, uncertified
from .composition import EPS_ERROR, compute_epsilon, spent

_COARSE_EPS_ERROR = 0.05
_MAX_NOISE_MULTIPLIER = 1e5
_MAX_CERTIFICATIONS = 30


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sampling_rate: float,
    num_steps: int,
    trainable_parameters: int,
    adjacency: Adjacency = "add-remove",
) -> float:
    """The least σ found whose certified upper ε, tail charged, is at most ``target_epsilon``.

    A coarse search on the accountant's estimate finds σ to 1e-4; certified evaluations at full
    precision then move it until the upper bound holds. The σ that is returned, a float that
    survives JSON unchanged, has itself been certified. ``target_epsilon`` infinite gives 0.

    Raises AccountingError where no σ can be certified, and as ``compute_epsilon`` does.
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
    if adjacency == "replace-one":
        # Without its library no σ has an answer, and the search would never say why.
        compute_epsilon(sampling_rate, 10.0, 1, target_delta, adjacency)
    setting = (sampling_rate, num_steps, target_delta, trainable_parameters, adjacency)
    file = _cache_file(target_epsilon, *setting)
    sigma = _read_cached(file)
    if sigma is not None and _upper(sigma, *setting) <= target_epsilon:
        return sigma
    sigma = _coarse_noise_multiplier(
        target_epsilon - EPS_ERROR, sampling_rate, num_steps, target_delta, adjacency
    )
    for _ in range(_MAX_CERTIFICATIONS):
        upper = _upper(sigma, *setting)
        if upper <= target_epsilon:
            sigma = _least_in_closed_form(sigma, target_epsilon, setting)
            _write_cached(file, sigma)
            return sigma
        # ε falls faster than 1/σ, so a quarter of what is missing is not too far. Where there is no
        # answer, more noise may be needed to get one.
        missing = upper / target_epsilon - 1
        sigma *= 1 + max(5e-4, missing / 4) if upper < math.inf else 1.1
    raise uncertified(sampling_rate, sigma, num_steps, target_delta)


def _least_in_closed_form(sigma: float, target: float, setting: tuple) -> float:
    """A σ that spends the whole of ``target``, where a closed form answers at once; else ``sigma``.

    Halving between a σ that is certified and one that is not; what is returned is certified.
    """
    if spent(setting[0], sigma, *setting[1:]).accountant != "analytic":
        return sigma
    low, high = sigma * 0.9, sigma
    if _upper(low, *setting) <= target:
        return sigma
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if _upper(middle, *setting) <= target:
            high = middle
        else:
            low = middle
    return high


def _upper(
    sigma: float,
    q: float,
    num_steps: int,
    delta: float,
    trainable_parameters: int,
    adjacency: Adjacency,
) -> float:
    try:
        return spent(q, sigma, num_steps, delta, trainable_parameters, adjacency).upper
    except AccountingError:
        return math.inf


def _coarse_noise_multiplier(
    target: float, q: float, steps: int, delta: float, adjacency: Adjacency
) -> float:
    # Finer than what RDP is too high by, or its bound would pass for the estimate.
    eps_error = min(_COARSE_EPS_ERROR, target / 50)

    @cache
    def excess(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        try:
            bounds = compute_epsilon(q, sigma, steps, delta, adjacency, eps_error=eps_error)
        except AccountingError:
            return math.inf
        return bounds.estimate - target

    high = math.log(max(1.0, math.sqrt(steps) * q))
    while excess(high) > 0:
        high += 0.5
        if high > math.log(_MAX_NOISE_MULTIPLIER):
            raise uncertified(q, math.exp(high), steps, delta)
    low = high - 0.5
    while excess(low) < 0:
        high, low = low, low - 0.5
    return _least_certifiable(excess, low, high)


def _least_certifiable(excess: Callable[[float], float], low: float, high: float) -> float:
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


def _cache_file(*setting: float | str) -> Path:
    pld_version = version("dp-accounting") if pld.is_installed() else None
    key = json.dumps([*setting, EPS_ERROR, MAX_GAUSSIAN, version("prv-accountant"), pld_version])
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
