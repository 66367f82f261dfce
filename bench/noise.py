"""Gaussian noise: how many values a second, from which generator, and whether it is N(0, 1).

Each source returns ``count`` normals of standard deviation 1. Ours is the whole mechanism as a step
runs it: ChaCha20 under a fresh nonce, normals in float64, added to a sum and divided.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import Tensor

from dpengine import ClippedSum
from dpengine.mechanism.noise import noisy_mean
from dpengine.mechanism.secure_random import SecureRandom

from .turns import DEVICE, Turns

OURS, RANDN, RANDN_DOUBLE = "dpengine", "torch.randn float32", "torch.randn float64"
OPACUS, OPACUS_SECURE = "opacus", "opacus secure_mode"
KEYSTREAM = "ChaCha20 alone"
"""The words that ours is made of, one for each value: not noise yet."""

Source = Callable[[int], Tensor]


def sources() -> dict[str, Source]:
    """All that make normals. Opacus' secure mode has its formula, four normals for one, over
    torch's generator: the package that would give it a secure one has no build for today's torch.
    """
    random = SecureRandom()

    def ours(count: int) -> Tensor:
        zeros = torch.zeros(count, dtype=torch.float64, device=DEVICE)
        return noisy_mean(ClippedSum(zeros, 1.0), 1.0, 1.0, random)

    def opacus(count: int, secure_mode: bool) -> Tensor:
        return _generate_noise(1.0, torch.empty(count, device=DEVICE), secure_mode=secure_mode)

    return {
        OURS: ours,
        RANDN: partial(torch.randn, device=DEVICE),
        RANDN_DOUBLE: partial(torch.randn, dtype=torch.float64, device=DEVICE),
        OPACUS: partial(opacus, secure_mode=False),
        OPACUS_SECURE: partial(opacus, secure_mode=True),
    }


def check(normals: Tensor) -> dict[str, float]:
    """Raise AssertionError unless mean and variance are those of standard normals; the two.

    Each may be five of its own standard deviations off: about one false alarm in 500,000 calls.
    """
    z, n = normals.double(), normals.numel()
    found = {"mean": float(z.mean()), "variance": float(z.square().mean())}
    # The variance of z² is 2.
    off = {"mean": found["mean"] * n**0.5, "variance": (found["variance"] - 1) * (n / 2) ** 0.5}
    for name, deviations in off.items():
        if not abs(deviations) <= 5:
            raise AssertionError(f"the {name} of {n:,} values is {deviations:.1f} deviations off")
    return found


def in_turns(count: int) -> Turns[str]:
    """Every source, and on a CPU the keystream alone, making ``count`` values in turns."""
    peers = {name: partial(source, count) for name, source in sources().items()}
    if DEVICE == "cpu":
        peers[KEYSTREAM] = partial(SecureRandom().words, count)
    turns = Turns(peers)
    turns.warm_up(2)
    return turns


def compared(count: int, turns: Turns[str]) -> dict[str, Any]:
    """Each peer's time over that of torch.randn in float32, and gigabytes a second.

    Four bytes a value for all, as weights take it, whatever it was made in.
    """
    return {
        "values": count,
        "over_randn": {name: turns.ratio(name, RANDN) for name in turns.seconds},
        "gb_per_s": {name: 4 * count / (ms * 1e6) for name, ms in turns.median_ms().items()},
    }
