"""Secret draws: timesteps and diffusion noise of a batch's rows, and for loops of one's own."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..mechanism.batches import PhysicalBatch
from ..mechanism.noise import normals
from ..mechanism.private import Private
from ..mechanism.secure_random import SecureRandom

if TYPE_CHECKING:
    from ..models import Batch, Times
    from .records import Records  # with readers of images, which a loop of one's own does not need


def draw_rows(
    records: "Private[Records]",
    batch: PhysicalBatch,
    draws_per_record: int,
    times: "Times",
    random: SecureRandom,
) -> "Private[Batch]":
    """K draws of each of the M records of every unit of ``batch``, zeros as padding.

    Row ``(n * M + m) * K + k`` is draw k of record m of unit n, with the `latents` and conditions
    of its record, and with secret `diffusion_noise` and `times` of its own: the M·K rows of a unit
    lie side by side. Its gradient is their average, taken before the norm. The padding fills slots
    that no unit has; every row of the padded batch costs the same draws, whoever is in it.

    times: the law of times, from uniforms.
    """
    found = records.reveal()
    rows_per_unit = batch.indices.shape[1]
    indices = torch.from_numpy(batch.indices).flatten()
    labels = found.labels[indices]

    def rows_of(table: Tensor, lines: Tensor) -> Tensor:
        padded = table.new_zeros(batch.n_slots * rows_per_unit, *table.shape[1:])
        padded[: len(lines)] = table[lines]
        return padded.repeat_interleave(draws_per_record, 0)

    uniforms = _stratified(batch.n_slots, rows_per_unit, draws_per_record, random)
    latents = rows_of(found.images, indices)
    normal = normals(random, latents.numel()).reshape(latents.shape)
    rows = {
        "latents": latents,
        "diffusion_noise": normal.to(latents.dtype),
        "times": torch.from_numpy(times(uniforms)).flatten(),
    }
    conditions = found.conditions.items()
    return Private(rows | {name: rows_of(table, labels) for name, table in conditions})


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
