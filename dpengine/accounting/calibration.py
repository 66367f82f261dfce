"""How much noise a budget needs."""

import hashlib
import json
import math
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ..errors import positive, positive_int, probability
from ..plan import Adjacency
from ..secure_random import MAX_GAUSSIAN
from .charges import AccountingError, uncertified
from .composition import EPS_ERROR, spent
from .tail import noise_tail_delta

_MAX_NOISE_MULTIPLIER = 1e5
_MAX_CERTIFICATIONS = 60
_UNSPENT = 5e-7
"""Share of the target that may be left."""


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sampling_rate: float,
    num_steps: int,
    trainable_parameters: int,
    adjacency: Adjacency = "add-remove",
) -> float:
    """The least σ found whose certified upper ε, tail charged, is at most ``target_epsilon``.

    A root finder on the certified bound itself, which ends where the bound is within 1e-6 of the
    target and not above it. The σ that is returned, a float that survives JSON unchanged, has
    itself been certified. A σ at which the cut tail of the noise is above a thousandth of
    ``target_delta`` is not used. ``target_epsilon`` infinite gives 0.

    Raises AccountingError where no σ can be certified.
    """
    if target_epsilon == math.inf:
        return 0.0
    positive(target_epsilon=target_epsilon, target_delta=target_delta)
    probability(sampling_rate=sampling_rate)
    positive_int(num_steps=num_steps, trainable_parameters=trainable_parameters)
    setting = (sampling_rate, num_steps, target_delta, trainable_parameters, adjacency)
    file = _cache_file(target_epsilon, *setting)
    sigma = _read_cached(file)
    if sigma is not None and _spends(_excess(sigma, *setting, target=target_epsilon)):
        return sigma
    sigma = _search(target_epsilon, *setting)
    _write_cached(file, sigma)
    return sigma


def _search(target: float, *setting: float | str) -> float:
    """σ between one that is above the target and one that is not, until the latter spends it.

    ε is nearly a power of σ: steps are of the secant through the logarithms, kept within the
    bracket, and every third one halves it.
    """
    excess = partial(_excess, target=target)
    q, num_steps, delta = setting[0], setting[1], setting[2]
    high = max(1.0, math.sqrt(num_steps) * q)
    over = excess(high, *setting)
    while over > 0:
        high *= 2
        if high > _MAX_NOISE_MULTIPLIER:
            raise uncertified(q, high, num_steps, delta)
        over = excess(high, *setting)
    low, under = high, over
    while under <= 0 and not _spends(over):
        high, over, low = low, under, low / 2
        under = excess(low, *setting)
    for number in range(_MAX_CERTIFICATIONS):
        if _spends(over) or high - low < 1e-12 * high:
            break
        share = 0.5
        if math.isfinite(under) and math.isfinite(over) and number % 3 < 2:
            # A little towards the side that may be used, which ends the search sooner.
            share = min(max((under + _UNSPENT / 3) / (under - over), 0.01), 0.99)
        middle = low * (high / low) ** share
        found = excess(middle, *setting)
        low, under, high, over = (
            (middle, found, high, over) if found > 0 else (low, under, middle, found)
        )
    return high


def _spends(excess: float) -> bool:
    return -_UNSPENT <= excess <= 0


def _excess(
    sigma: float,
    q: float,
    num_steps: int,
    delta: float,
    trainable_parameters: int,
    adjacency: Adjacency,
    target: float,
) -> float:
    """``ln(ε / target)``, infinite where no ε can be certified or the tail is too much of δ."""
    if noise_tail_delta(q, sigma, num_steps, trainable_parameters, adjacency) > delta / 1000:
        return math.inf
    try:
        upper = spent(q, sigma, num_steps, delta, trainable_parameters, adjacency).upper
    except AccountingError:
        return math.inf
    return math.log(upper / target) if upper > 0 else -math.inf


def _cache_file(*setting: float | str) -> Path:
    key = json.dumps([*setting, EPS_ERROR, MAX_GAUSSIAN, version("dpengine")])
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
