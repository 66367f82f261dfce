"""The Gaussian mechanism: noise in proportion to the sensitivity that the sum itself carries."""

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
        return ops.add_noise(values, stream, noise_stddev=noise_stddev, divisor=divisor)
    # The same mechanism; on a CPU a library makes the words faster.
    noisy = values.clone()
    for piece in noisy.split(_PIECE):
        piece.add_(noise_stddev * normals(random, piece.numel()))
    return noisy.div_(divisor)
