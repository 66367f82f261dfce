"""An interval that holds ε of subsampled Gaussian mechanisms, to judge accountants by.

Its upper end is by dp-accounting, its lower end by the argument below, and nothing of dpengine's
accountants is in either. Of add-remove adjacency.

A lower bound is the ε of anything that can be computed from what the mechanism gives out. Here its
real number z, of density (1 - q) N(0, σ²) + q N(1, σ²) with the record and N(0, σ²) without, is
replaced by the number of the cell that it lies in, or by a coin of a neighbouring cell. A cell's
loss is the logarithm of its mass with the record over its mass without; the coins are such that it
is nearly a point of a grid, to which it is rounded down. Sums of T such losses are on a grid too,
so their distribution is a power of a Fourier transform.
"""

import math
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr

_REACH = 14.0
"""Standard deviations of the noise beyond which all is one cell: a mass of 1e-44."""

_COARSE, _CELLS, _SUMS = 2**14, 2**17, 2**20
_WIDTH = 40.0
"""Standard deviations of the sum that its grid is wide."""

_ROUNDING = 1e-6
"""What float64 may misplace, as a share of δ: a T-th power errs by T 2⁻⁵², 2e-10 for a million."""

_COINS, _MOST_MOVED = 10, 0.4


@dataclass(frozen=True)
class Setting:
    """``num_steps`` Poisson-subsampled Gaussian mechanisms at ``delta``."""

    noise_multiplier: float
    sampling_rate: float
    num_steps: int
    delta: float

    def __str__(self) -> str:
        rate, steps = f"q = {self.sampling_rate:.3g}", f"T = {self.num_steps:,}"
        return f"σ = {self.noise_multiplier:.4g}, {rate}, {steps}, δ = {self.delta:g}"


@dataclass(frozen=True)
class Bracket:
    """``low <= ε <= high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Losses:
    """Losses of one step, ``origin + step * index``, and their mass with the record."""

    origin: float
    step: float
    index: np.ndarray
    mass: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.origin + self.step * self.index

    def tilted(self, tilt: float) -> tuple[float, np.ndarray]:
        """``ln E exp(tilt * loss)``, and the masses times ``exp(tilt * loss)`` with a sum of 1."""
        exponent = tilt * self.values
        log_moment = float(logsumexp(exponent, b=self.mass))
        return log_moment, self.mass * np.exp(exponent - log_moment)


def bracket(setting: Setting) -> Bracket:
    """Both ends of the interval."""
    return Bracket(lower(setting), upper(setting))


def upper(setting: Setting) -> float:
    """By privacy loss distributions, rounded up. Infinite where δ is no more than may be rounded.

    Too high by about ``num_steps * grid**2``, 2e-5 at most for σ near 1. What transforms round is
    charged to δ, as the largest estimate of it has it: 2⁻⁴⁷ (T + 32).
    """
    charged = setting.delta - 2**-47 * (setting.num_steps + 32)
    if charged <= 0:
        return math.inf
    loss = from_gaussian_mechanism(
        setting.noise_multiplier,
        value_discretization_interval=min(1e-3, 5e-3 / math.sqrt(setting.num_steps)),
        sampling_prob=setting.sampling_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    composed = loss.self_compose(setting.num_steps, min(1e-15, setting.delta / 1e6))
    return float(composed.get_epsilon_for_delta(charged))


def lower(setting: Setting) -> float:
    """By the argument of this file. Too low by a term of second order in the grid, as ``upper``."""
    q, sigma, num_steps = setting.sampling_rate, setting.noise_multiplier, setting.num_steps
    furthest = (1 + 2 * _REACH * sigma) / (2 * sigma**2)
    least = math.log1p(-q) if q < 1 else -furthest
    span = math.log1p(q * math.expm1(furthest)) - least
    coarse = _losses(q, sigma, least, span, span / _COARSE)
    tilt = _tilt(coarse, setting)
    _, tilted = coarse.tilted(tilt)
    variance = num_steps * float(tilted @ (coarse.values - tilted @ coarse.values) ** 2)
    width = span + _WIDTH * math.sqrt(variance)
    losses = _losses(q, sigma, least, span, max(span / _CELLS, width / _SUMS))
    return max(_epsilon(losses, tilt, setting, width), 0.0)


def _losses(q: float, sigma: float, least: float, span: float, step: float) -> Losses:
    """Cells as wide as ``step`` in the loss, their coins, and what is left rounded down.

    The grid is moved down as far as makes the rounding cost least.
    """
    points = least + (np.arange(math.ceil(span / step)) + 0.5) * step
    with np.errstate(divide="ignore"):
        within = np.log1p(np.maximum(np.expm1(points[:-1] + step / 2) / q, -1.0))
    z = np.concatenate([[-np.inf], sigma * within + 0.5 / sigma, [np.inf]])
    without = _normal_mass(z)
    mass = (1 - q) * without + q * _normal_mass(z - 1 / sigma)
    for _ in range(_COINS):
        mass, without = _nearer(mass, without, np.exp(points))
    seen = (mass > 0) & (without > 0)
    mass, loss = mass[seen], np.log(mass[seen] / without[seen]) - points[0]
    shifts = step * 0.0625 ** np.arange(1, 8)
    kept = [mass @ (np.floor((loss + shift) / step) * step - shift) for shift in shifts]
    shift = float(shifts[np.argmax(kept)])
    index = np.floor((loss + shift) / step).astype(int)
    index, which = np.unique(index, return_inverse=True)
    return Losses(float(points[0]) - shift, step, index, np.bincount(which, mass))


def _normal_mass(edges: np.ndarray) -> np.ndarray:
    """Of a standard normal between each two edges, to float64's precision in both tails."""
    a, b = edges[:-1], edges[1:]
    return np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))


def _nearer(mass: np.ndarray, without: np.ndarray, ratio: np.ndarray) -> list[np.ndarray]:
    """Each cell takes of its neighbour above or below what its ratio of masses lacks.

    What is taken is a share of a cell, the same of both of its masses, so it is a coin.
    """
    lacks = ratio * without - mass
    brings = np.append(mass[1:] - ratio[:-1] * without[1:], 0.0)
    lowers = np.append(0.0, ratio[1:] * without[:-1] - mass[:-1])
    above, below = (
        np.minimum(np.maximum(wanted, 0) / np.where(offered > 0, offered, np.inf), _MOST_MOVED)
        for wanted, offered in ((lacks, brings), (-lacks, lowers))
    )
    kept = 1 - np.append(0.0, above[:-1]) - np.append(below[1:], 0.0)
    return [
        of * kept + above * np.append(of[1:], 0.0) + below * np.append(0.0, of[:-1])
        for of in (mass, without)
    ]


def _tilt(losses: Losses, setting: Setting) -> float:
    """The θ of Chernoff's bound of δ, at which the tilted sum is about ε in the mean."""

    def excess(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        log_moment, tilted = losses.tilted(tilt)
        exponent = log_moment - tilt * float(tilted @ losses.values)
        return setting.num_steps * exponent - math.log(setting.delta)

    return math.exp(brentq(excess, math.log(1e-6), math.log(1e5), xtol=0.05))


def _epsilon(losses: Losses, tilt: float, setting: Setting, width: float) -> float:
    """The ε at which ``E[(1 - exp(ε - s))+]`` of the sum s is δ.

    Tilted before it is transformed, for then rounding is small beside δ and not only beside 1.
    """
    num_steps, size = setting.num_steps, next_fast_len(math.ceil(width / losses.step), real=True)
    log_moment, tilted = losses.tilted(tilt)
    composed = rfft(np.bincount(losses.index % size, tilted, minlength=size)) ** num_steps
    centre = round(num_steps * float(tilted @ losses.index))
    steps = np.arange(-(size // 4), size // 2)
    start, away = num_steps * losses.origin + losses.step * centre, losses.step * steps
    log_weight = num_steps * log_moment - tilt * (start + away)
    # What the exponents are cut to is far from ε, and cutting those above ε lowers it.
    mass = np.maximum(irfft(composed, size)[(centre + steps) % size], 0.0)
    mass *= np.exp(np.minimum(log_weight, 300.0))
    factor = np.exp(np.clip(away, -300.0, 300.0))
    above, weighted = (np.cumsum(of[::-1])[::-1] for of in (mass, mass / factor))
    delta = setting.delta * (1 + _ROUNDING)
    first = np.flatnonzero(above - factor * weighted >= delta)[-1] + 1
    return float(start + math.log((above[first] - delta) / weighted[first]))
