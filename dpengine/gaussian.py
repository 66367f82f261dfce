"""Standard normals from secret random words."""

import numpy as np
import torch
from torch import Tensor

from .kernels import ops
from .secure_random import SecureRandom


def normals(random: SecureRandom, count: int) -> Tensor:
    """Independent standard normals under a nonce of their own.  float64 [count]"""
    n_blocks = -(-count // 8)
    words = torch.from_numpy(random.words(8 * n_blocks).astype(np.int64))
    return ops.gaussians(words.reshape(n_blocks, 8))[:count]
