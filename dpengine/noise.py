"""The Gaussian mechanism: noise in proportion to the sensitivity that the sum itself carries."""

import math

import torch
from torch import Tensor

from .clipping import ClippedSum
from .errors import not_negative, positive
from .gaussian import normals
from .kernels import ops
from .secure_random import SecureRandom

_PIECE = 2**16
"""Normals that are made at a time on a CPU; each takes 40 bytes on its way."""


def noisy_mean(
    clipped_sum: ClippedSum, noise_multiplier: float, divisor: float, random: SecureRandom
) -> Tensor:
    """``(sum + σ · sensitivity · z) / divisor``, z standard normal, one draw for each element.

    The noised sum is rounded to the grid of ``grid_spacing`` first.

    ``noise_multiplier`` σ is dimensionless; 0 adds nothing and gives no privacy. ``divisor`` is a
    public constant, never the size of a batch.  -> float64 [P]

    Guarantee: for σ > 0 this is the Gaussian mechanism with noise multiplier σ, up to the cut
    tail that ``accounting.noise_tail_delta`` charges.
    """
    not_negative(noise_multiplier=noise_multiplier)
    positive(divisor=divisor)
    values = clipped_sum.values
    if noise_multiplier == 0:
        return values / divisor
    noise_stddev = noise_multiplier * clipped_sum.sensitivity
    if values.is_cuda:
        stream = torch.from_numpy(random.stream()).to(values.device)
        noisy = ops.add_noise(values, stream, noise_stddev=noise_stddev, divisor=1.0)
    else:
        # The same mechanism; on a CPU a library makes the words faster.
        noisy = values.clone()
        for piece in noisy.split(_PIECE):
            piece.add_(noise_stddev * normals(random, piece.numel()))
    spacing = grid_spacing(noise_stddev)
    return noisy.div_(spacing).round_().mul_(spacing).div_(divisor)


def grid_spacing(noise_stddev: float) -> float:
    """The distance between the values that a noised sum may take: a power of two near σ C / 1024.

    Float64 is no line but a lattice: a sum of records has low bits of its own, and the floats that
    noise can be are spaced by their own size, so that the last bits of ``sum + noise`` tell which
    sum was under it (Mironov, CCS 2012, for Laplace noise; Holohan and Braghin, CCS 2021, for
    Gaussian noise). They are rounded away before anything else sees them.

    Guarantee: every released value is a whole multiple of a spacing that public numbers alone
    decide, whatever the records are. So no value has bits that only one of two neighbouring sums
    could give, and what is released is a function of the cell of the grid that ``sum + noise``
    lies in. In real arithmetic that is post-processing of the Gaussian mechanism. In float64
    ``sum + noise`` is off by at most ``e = 2⁻⁵³ (|sum| + 32 σ C)`` (normals reach 9.42 and are
    right to 4 ulp), so the probability of a cell is that of a cell whose two edges have moved by
    at most e: by ``2 e / spacing``, relative to a cell within a few σ C of the sum, which is below
    2⁻³⁷ where |sum| is below 64 σ C. This remainder is a stated limit of floating point. The
    rounding adds ``spacing² / 12`` to the variance, less than one part in 10⁷.
    """
    return 2.0 ** (math.floor(math.log2(noise_stddev)) - 10)
