"""Tests of what is left of a release when its canaries are taken out: is it the noise claimed?

They use what only an auditor of canaries knows, so they see far smaller faults than an attack: a
million residuals fix the standard deviation to 0.07 % (one standard error). Each gives the chance
of what was seen, or of anything less likely, if the engine is right.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import fft
from scipy.stats import beta, binom, chi2, kstwobign, norm
from torch import Tensor

from ..mechanism.noise import grid_step
from .canaries import MAX_GRAD_NORM
from .runs import Releases

_ROWS_AT_A_TIME = 512
_MOST_VALUES = 2**20
_FAR = 4.0


class Check(NamedTuple):
    """What was looked at, and the p-value: at most α with a chance of α in a right engine."""

    name: str
    p_value: float


def check_releases(releases: Releases, noise_multiplier: float) -> list[Check]:
    """All tests of residuals, for releases of independent noise N(0, σ²) in units of C.

    A maximum over many is multiplied by their number (Bonferroni). Not seen, among others: noise
    that a single later release repeats at other coordinates, a tail that ends beyond four standard
    deviations, and a direction without noise that is neither a coordinate nor their sum.
    """
    residuals = releases.residuals / noise_multiplier
    stddev = noise_multiplier * MAX_GRAD_NORM
    cell = grid_step(stddev) / stddev
    squares = residuals.square()
    return [
        Check("size of the noise", chi_square(float(squares.sum()), squares.numel())),
        Check("noise in each coordinate", _worst(squares.sum(0), len(squares))),
        Check("noise in each release", _worst(squares.sum(1), squares.shape[1])),
        Check("noise in the sum of a release", _check_sums(residuals)),
        Check("law of the noise", _check_law(residuals, cell)),
        Check("tail of the noise", _check_tail(residuals, cell)),
        Check("size of a clipped gradient", _check_contribution(residuals, releases.entered)),
        Check("noise used in two releases", _check_pairs(residuals)),
        Check("noise used at two coordinates", _check_pairs(residuals.T.contiguous())),
        Check("noise used again at any distance", _check_distances(residuals)),
    ]


def chi_square(sum_of_squares: float, n: int) -> float:
    """Two-sided p-value of a sum of ``n`` squared standard normals; 0 where it is not finite."""
    if not math.isfinite(sum_of_squares):
        return 0.0
    tails = chi2.cdf(sum_of_squares, n), chi2.sf(sum_of_squares, n)
    return min(1.0, 2 * float(min(tails)))


def noise_interval(residuals: Tensor, confidence: float) -> tuple[float, float, float]:
    """Estimate of the noise multiplier from residuals in units of C, and its interval's ends."""
    total, n, alpha = float(residuals.square().sum()), residuals.numel(), 1 - confidence
    ends = chi2.isf(alpha / 2, n), chi2.ppf(alpha / 2, n)
    low, high = (math.sqrt(total / float(end)) for end in ends)
    return math.sqrt(total / n), low, high


def check_rate(entries: int, chances: int, sampling_rate: float) -> Check:
    """Whether canaries entered batches with the probability that is accounted for; two-sided."""
    below = binom.cdf(entries, chances, sampling_rate)
    above = binom.sf(entries - 1, chances, sampling_rate)
    return Check("sampling rate", min(1.0, 2 * float(min(below, above))))


def _worst(sums: Tensor, n: int) -> float:
    """The p-value of the least likely of ``sums``, each of ``n`` squares."""
    return min(1.0, len(sums) * min(chi_square(float(end), n) for end in (sums.min(), sums.max())))


def _check_contribution(residuals: Tensor, entered: Tensor) -> float:
    """Two-sided p-value of the difference in mean between canaries that are in and out.

    A record that adds C exactly leaves none; the difference is N(0, 1/n_in + 1/n_out).
    """
    n_in, n_out = int(entered.sum()), int((~entered).sum())
    if n_in == 0 or n_out == 0:
        return 1.0
    difference = float(residuals[entered].mean() - residuals[~entered].mean())
    if not math.isfinite(difference):
        return 0.0
    return 2 * float(norm.sf(abs(difference) / math.sqrt(1 / n_in + 1 / n_out)))


def _check_sums(residuals: Tensor) -> float:
    """Two-sided p-value of the sums over coordinates, whose variance is their number."""
    sums = residuals.sum(1)
    return chi_square(float(sums.square().sum()) / residuals.shape[1], len(sums))


def _check_law(residuals: Tensor, cell: float) -> float:
    """The p-value of Kolmogorov and Smirnov's distance to the normal law, between cells of a grid.

    What is released is rounded to a public grid: within a cell the empirical law is not the normal
    one, at its borders it is.
    """
    values = residuals.flatten()[:_MOST_VALUES].numpy()
    if not np.isfinite(values).all():
        return 0.0
    cells = np.rint((values / cell).clip(-(2**20), 2**20)).astype(np.int64)
    counts = np.bincount(cells - cells.min())
    borders = cell * (cells.min() + np.arange(len(counts)) + 0.5)
    distance = np.abs(counts.cumsum() / len(values) - norm.cdf(borders)).max()
    return float(kstwobign.sf(distance * math.sqrt(len(values))))


def _check_tail(residuals: Tensor, cell: float) -> float:
    """Two-sided p-value of how many lie beyond four standard deviations, 63 in a million."""
    far = cell * (round(_FAR / cell) + 0.5)  # a border
    n, beyond = residuals.numel(), int((residuals.abs() > far).sum())
    mass = 2 * norm.sf(far)
    tails = binom.cdf(beyond, n, mass), binom.sf(beyond - 1, n, mass)
    return min(1.0, 2 * float(min(tails)))


def _check_pairs(rows: Tensor) -> float:
    """The p-value of the largest correlation, either sign, between two of ``rows`` [m, n], n >= 2.

    Of independent standard normal rows about zero, ``r² ~ Beta(1/2, (n - 1)/2)`` exactly.
    """
    m, n = rows.shape
    if m < 2:
        return 1.0
    largest = _largest_correlation(rows)
    if not math.isfinite(largest):
        return 0.0  # a row of zeros: no noise at all
    tail = float(beta.sf(min(largest, 1.0) ** 2, 0.5, (n - 1) / 2))
    return min(1.0, m * (m - 1) / 2 * tail)


def _check_distances(residuals: Tensor) -> float:
    """The p-value of the largest ``S_k = Σ_i x_i x_{i+k}``, k from 1, of all values in one row.

    The values of one release follow those of the one before: with D values in a release, k = D
    is what each step keeps of the last one's noise, k = j D of the one j steps before, and other k
    are noise that comes again at other coordinates. Power: the share r of every value that came k
    values before moves S_k by r m, m = n - k, where its standard deviation is √m: 1 % is seen in
    a million values.

    Proof of the bound ``P[|S_k| >= s] <= 2 exp(-s² / (2 (m + 2 s)))``: S_k is ``xᵀ A x`` with A
    half of the adjacency matrix of k paths of m edges in all. Its eigenvalues λ lie within ±1, for
    those of a path do, and ``Σ λ = 0``, ``Σ λ² = m / 2``. For ``0 < t < 1/2``, by
    ``-log(1 - y) - y <= y² / (2 (1 - |y|))``, ``log E exp(t S_k) = -1/2 Σ log(1 - 2 t λ)`` is at
    most ``t² m / (2 (1 - 2 t))``; take t = s / (m + 2 s), and the same for -S_k (Boucheron, Lugosi
    and Massart, Concentration Inequalities, 2013, section 2.4).
    """
    values = residuals.flatten().numpy()
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return float(n < 2)
    size = fft.next_fast_len(2 * n, real=True)
    spectrum = fft.rfft(values, size)
    sums = np.abs(fft.irfft(spectrum.real**2 + spectrum.imag**2, size)[1:n])
    exponents = sums**2 / (2 * (np.arange(n - 1, 0, -1) + 2 * sums))
    return min(1.0, 2 * (n - 1) * math.exp(-float(exponents.max())))


def _largest_correlation(rows: Tensor) -> float:
    units = (rows / rows.norm(dim=1, keepdim=True)).float()
    largest = 0.0
    for start in range(0, len(units), _ROWS_AT_A_TIME):
        products = units[start : start + _ROWS_AT_A_TIME] @ units[start:].T
        found = float(products.triu(1).abs().max())
        if not math.isfinite(found):
            return math.nan
        largest = max(largest, found)
    return largest
