"""The secret draws of a physical batch: timesteps and diffusion noise for each row."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .data import Records
from .gaussian import normals
from .sampling import PhysicalBatch
from .secure_random import SecureRandom


@dataclass(frozen=True)
class Rows:
    """The N·K rows of a physical batch; row ``n * K + k`` is draw k of record n."""

    latents: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    timesteps: Tensor = field(repr=False)
    diffusion_noise: Tensor = field(repr=False)


def draw_rows(
    records: Records,
    batch: PhysicalBatch,
    draws_per_record: int,
    num_train_timesteps: int,
    random: SecureRandom,
) -> Rows:
    """K draws of every record of ``batch``, zeros with label 0 in the padding.

    The K timesteps of a record are stratified, one uniform in each K-th of the schedule: their
    average has the expectation of K independent ones and less variance. Every row of the padded
    batch costs the same draws, whoever is in it.
    """
    n_slots, indices = batch.n_slots, torch.from_numpy(batch.indices)
    latents = records.images.new_zeros(n_slots, *records.images.shape[1:])
    labels = records.labels.new_zeros(n_slots)
    latents[: len(indices)] = records.images[indices]
    labels[: len(indices)] = records.labels[indices]

    offsets = random.uniform(n_slots * draws_per_record).reshape(n_slots, draws_per_record)
    strata = (np.arange(draws_per_record) + offsets) / draws_per_record
    timesteps = torch.from_numpy((strata * num_train_timesteps).astype(np.int64)).flatten()
    latents = latents.repeat_interleave(draws_per_record, 0)
    normal = normals(random, latents.numel()).reshape(latents.shape)
    return Rows(
        latents=latents,
        labels=labels.repeat_interleave(draws_per_record),
        timesteps=timesteps.clamp_(max=num_train_timesteps - 1),
        diffusion_noise=normal.to(latents.dtype),
    )
