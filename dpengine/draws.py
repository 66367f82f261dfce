"""The secret draws of a batch: timesteps and diffusion noise, for our steps and a user's loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .gaussian import normals
from .kernels import ops
from .private import Private
from .sampling import PhysicalBatch
from .secure_random import SecureRandom

if TYPE_CHECKING:
    from .data import Records  # with readers of images, which a user's loop does not need

_PIECE = 2**16
"""Normals that are made at a time on a CPU; each takes 40 bytes on its way."""


def secure_normal(
    shape: int | Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normals that nobody can repeat: `torch.randn` for a loop over private records.

    Each call draws under a fresh 256-bit key from the operating system; no seed, torch's included,
    changes or repeats it. shape, device and dtype as in torch; dtype is of floats. The normals are
    made in float64, reach 9.4 standard deviations and are rounded to ``dtype``.

    What is lost with `torch.randn`: its generator is seeded, on a CPU by 32 bits at most, so an
    attacker can try every seed and then knows the draws of every row. As they are taken by position
    in the batch, one record more shifts those of all behind it, and to who knows the draws that
    moves the sum by far more than the noise covers: epsilon holds for secret draws only.
    """
    values = torch.empty(shape, device=device, dtype=dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be one of floats, such as torch.float32, got {dtype}")
    random = SecureRandom()
    if values.is_cuda:
        stream = torch.from_numpy(random.stream()).to(values.device)
        zeros = torch.zeros(values.numel(), device=values.device, dtype=torch.float64)
        normal = ops.add_noise(zeros, stream, noise_stddev=1.0, divisor=1.0)
        return values.copy_(normal.reshape(values.shape))
    for piece in values.view(-1).split(_PIECE):
        piece.copy_(normals(random, piece.numel()).to(dtype))
    return values


def secure_normal_like(tensor: Tensor) -> Tensor:
    """``secure_normal`` in the shape, on the device and of the dtype of ``tensor``."""
    return secure_normal(tensor.shape, device=tensor.device, dtype=tensor.dtype)


def secure_integers(
    low: int,
    high: int,
    shape: int | Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw whole numbers from ``low`` to ``high - 1`` that nobody can repeat: `torch.randint`.

    For the timesteps of private records: ``secure_integers(0, num_train_timesteps, (rows,))``.
    Secret and fresh as in ``secure_normal``. Each is a 64-bit word modulo the number r of values,
    within r·2⁻⁶⁴ of uniform.  int64 ``shape``

    Raises ValueError where there is no number to draw, or one is outside int64.
    """
    if not -(2**63) <= low < high <= 2**63:
        raise ValueError(
            f"low must be below high, and both within int64, got low {low} and high {high}"
        )
    values = torch.empty(shape, device=device, dtype=torch.int64)
    words = SecureRandom().words(values.numel())
    steps = words if high - low == 2**64 else words % np.uint64(high - low)
    # Sums wrap at 64 bits, as int64 does.
    numbers = (steps + np.uint64(low % 2**64)).astype(np.int64)
    return values.copy_(torch.from_numpy(numbers).reshape(values.shape))


@dataclass(frozen=True)
class Rows:
    """The N·M·K rows of a physical batch of N slots.

    Row ``(n * M + m) * K + k`` is draw k of record m of unit n: the M·K rows of a unit lie side
    by side. Its gradient is their average, taken before the norm.
    """

    latents: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    timesteps: Tensor = field(repr=False)
    diffusion_noise: Tensor = field(repr=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a ``Loss`` takes, in its order."""
        return self.latents, self.labels, self.timesteps, self.diffusion_noise


def draw_rows(
    records: "Private[Records]",
    batch: PhysicalBatch,
    draws_per_record: int,
    num_train_timesteps: int,
    random: SecureRandom,
) -> Private[Rows]:
    """K draws of each of the M records of every unit of ``batch``, zeros with label 0 as padding.

    The padding fills slots that no unit has; every row of the padded batch costs the same draws,
    whoever is in it.
    """
    images, labels_of = records.reveal().images, records.reveal().labels
    rows_per_unit = batch.indices.shape[1]
    indices = torch.from_numpy(batch.indices).flatten()
    latents = images.new_zeros(batch.n_slots * rows_per_unit, *images.shape[1:])
    labels = labels_of.new_zeros(batch.n_slots * rows_per_unit)
    latents[: len(indices)] = images[indices]
    labels[: len(indices)] = labels_of[indices]

    uniforms = _stratified(batch.n_slots, rows_per_unit, draws_per_record, random)
    timesteps = torch.from_numpy((uniforms * num_train_timesteps).astype(np.int64)).flatten()
    latents = latents.repeat_interleave(draws_per_record, 0)
    normal = normals(random, latents.numel()).reshape(latents.shape)
    return Private(
        Rows(
            latents=latents,
            labels=labels.repeat_interleave(draws_per_record),
            timesteps=timesteps.clamp_(max=num_train_timesteps - 1),
            diffusion_noise=normal.to(latents.dtype),
        )
    )


def _stratified(n_slots: int, m: int, k: int, random: SecureRandom) -> np.ndarray:
    """Uniforms in [0, 1), one in each of the M·K equal strata for every slot.  [N, M, K]

    Stratum ``k * M + (m + shift) % M`` goes to draw k of record m, with a secret shift uniform
    over M for every slot. A record's K draws are then M strata apart, and each, the shift counted,
    uniform over its K-th of [0, 1): no record is tied to a part of the schedule, and the average
    over a unit has the expectation of independent draws and less variance. With M = 1 these are K
    strata for each record. The shift is a 64-bit word modulo M, within M·2⁻⁶⁴ of uniform.
    """
    shift = (random.words(n_slots) % np.uint64(m)).astype(np.int64)
    part = (np.arange(m) + shift[:, None]) % m  # [N, M]
    strata = np.arange(k) * m + part[:, :, None]  # [N, M, K]
    return (strata + random.uniform(strata.size).reshape(strata.shape)) / (m * k)
