"""Secret draws: timesteps and diffusion noise of a batch's rows, and for loops of one's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..mechanism.batches import PhysicalBatch
from ..mechanism.noise import normals
from ..mechanism.private import Private
from ..mechanism.secure_random import SecureRandom

if TYPE_CHECKING:
    from .records import Records  # with readers of images, which a loop of one's own does not need


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


def secure_normal(
    shape: int | Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of ``shape``, in place of `torch.randn` for diffusion noise.

    No seed repeats them: the operating system keys each call anew. On a CPU, torch's generator has
    at most 2³² states after a seed: who tries them one after another knows the draws of every row,
    and to them a record more moves the sum by more than C. Raises TypeError for a dtype of no
    floats.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be one of floats, such as torch.float32, got {dtype}")
    shape = _size(shape)
    values = normals(SecureRandom(), math.prod(shape)).reshape(shape)
    return values.to(device=device, dtype=dtype)


def secure_normal_like(x: Tensor) -> Tensor:
    """``secure_normal`` of the shape, device and type of ``x``."""
    return secure_normal(x.shape, device=x.device, dtype=x.dtype)


def secure_integers(
    low: int, high: int, shape: int | Sequence[int], *, device: torch.device | str | None = None
) -> Tensor:
    """Uniform integers in [low, high), in place of `torch.randint` for timesteps.  int64

    Each value has probability 1 / (high - low), but for 2⁻⁶⁴. Keyed like ``secure_normal``. Raises
    ValueError where there is no number to draw, or 2⁶³ numbers or more.
    """
    if not (low < high and high - low < 2**63 and -(2**63) <= low <= high <= 2**63):
        raise ValueError(
            f"low must be below high, both in int64, by less than 2**63, got {low} and {high}"
        )
    shape = _size(shape)
    words = SecureRandom().words(math.prod(shape)) % np.uint64(high - low)
    return (torch.from_numpy(words.astype(np.int64)) + low).reshape(shape).to(device)


def _size(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


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
