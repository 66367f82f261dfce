"""The Gaussian mechanism: noise in proportion to the sensitivity that the sum itself carries."""

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import not_negative, positive
from ..kernels import ops
from .clipping import ClippedSum
from .secure_random import SecureRandom

_PIECE = 2**16
"""Normals that are made at a time on a CPU; each takes 40 bytes on its way."""


def grid_step(noise_stddev: float) -> float:
    """Spacing of the grid of noised sums: a power of two, 1/512 to 1/256 of ``noise_stddev``."""
    return math.ldexp(1.0, math.frexp(noise_stddev)[1] - 9)


def noisy_mean(
    clipped_sum: ClippedSum, noise_multiplier: float, divisor: float, random: SecureRandom
) -> Tensor:
    """``(sum + σ · sensitivity · z) / divisor``, z standard normal, one draw for each element.

    ``noise_multiplier`` σ is dimensionless; 0 adds nothing and gives no privacy. ``divisor`` is a
    public constant, never the size of a batch. The noised sum is rounded to the public grid of
    ``grid_step``, which adds less than 2⁻¹⁹ of the noise's variance.  -> float64 [P]

    Guarantee: for σ > 0 this is the Gaussian mechanism with noise multiplier σ, up to the cut
    tail that ``accounting.noise_tail_delta`` charges, and up to the last bits of float64 below.

    Proof. With Δ the step and s the standard deviation, the result is a function of
    ``round((v + s z) / Δ)``, which is post-processing of ``v + s z``. It is computed from
    ``v = k Δ + f``, k whole and ``|f| <= Δ / 2``: scaling by a power of two and both parts are
    exact, and ``k + round((f + s z) / Δ)`` is a whole number, so the lattice on which float64 has
    v, which tells neighbours apart where ``v + s z`` is released as it is (Mironov, CCS 2012),
    enters nowhere. What is left is that z is computed: f + s z is wrong by less than 2⁻⁴⁴ s,
    ``|z| < 9.5`` and the roundings of logarithm, root, cosine, product and sum being a few ulps of
    it, and this matters only within that distance of the border of a cell. A cell is 2⁻⁹ s wide at
    least, and within it the density changes by a factor below ``exp(9.5 · 2⁻⁸)``: the probability
    of each cell, hence the likelihood ratio of two neighbours, is right to a factor of
    ``1 ± 2⁻³³`` in each of the P elements. Rounding after the noise as a means: Mironov, CCS 2012;
    what noise in floating point loses: Holohan and Braghin, arXiv 2107.10138.
    """
    not_negative(noise_multiplier=noise_multiplier)
    positive(divisor=divisor)
    values = clipped_sum.values
    if noise_multiplier == 0:
        return values / divisor
    noise_stddev = noise_multiplier * clipped_sum.sensitivity
    step = grid_step(noise_stddev)
    if values.is_cuda:
        whole = values.div(step).round_().mul_(step)
        stream = torch.from_numpy(random.stream()).to(values.device)
        noisy = ops.add_noise(values - whole, stream, noise_stddev=noise_stddev, divisor=1.0)
        return noisy.div_(step).round_().mul_(step).add_(whole).div_(divisor)
    # The same mechanism; on a CPU a library makes the words faster.
    released = torch.empty_like(values)
    for piece, part in zip(values.split(_PIECE), released.split(_PIECE), strict=True):
        whole = piece.div(step).round_()
        noise = normals(random, piece.numel())
        torch.add(piece.sub(whole, alpha=step), noise, alpha=noise_stddev, out=part)
        part.div_(step).round_().add_(whole).mul_(step)
    return released.div_(divisor)


def normals(random: SecureRandom, count: int) -> Tensor:
    """Independent standard normals under a nonce of their own.  float64 [count]"""
    n_blocks = -(-count // 8)
    words = torch.from_numpy(random.words(8 * n_blocks).astype(np.int64))
    return ops.gaussians(words.reshape(n_blocks, 8))[:count]
