"""The Gaussian mechanism: noise in proportion to the sensitivity that the sum itself carries."""

import torch
from torch import Tensor

from .clipping import ClippedSum
from .errors import not_negative
from .secure_random import SecureRandom


def add_noise(
    clipped_sum: ClippedSum, noise_multiplier: float, random: SecureRandom
) -> list[Tensor]:
    """``sum + σ · sensitivity · z`` with z standard normal, in float64, one draw per element.

    ``noise_multiplier`` σ is dimensionless; 0 returns the sum as it is and gives no privacy.

    Guarantee: for σ > 0 this is the Gaussian mechanism with noise multiplier σ, up to the cut
    tail that ``accounting.noise_tail_delta`` charges.
    """
    not_negative(noise_multiplier=noise_multiplier)
    if noise_multiplier == 0:
        return clipped_sum.tensors
    noise_stddev = noise_multiplier * clipped_sum.sensitivity
    noisy = []
    for tensor in clipped_sum.tensors:
        z = torch.from_numpy(random.normal(tensor.numel())).to(tensor.device)
        noisy.append(tensor + noise_stddev * z.reshape(tensor.shape))
    return noisy
