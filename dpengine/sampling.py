"""Poisson sampling, cut into physical batches of one constant shape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .capture import BatchNotice
from .errors import positive_int
from .plan import PrivacyPlan
from .secure_random import SecureRandom


@dataclass(frozen=True)
class PhysicalBatch:
    """One forward pass: the records of ``indices``, then padding up to ``n_slots``."""

    indices: np.ndarray = field(repr=False)
    n_slots: int
    is_first: bool
    is_last: bool

    @property
    def notice(self) -> BatchNotice:
        """What the capture has to know of this batch."""
        return BatchNotice(len(self.indices), self.n_slots, self.is_first, self.is_last)


class PoissonSampler:
    """Draws ``num_steps`` logical batches: each record enters each one with probability q.

    The coins are secret, fresh and 64 bits wide. Every logical batch is reserved before its coins
    are drawn, and cut into physical batches of ``physical_batch_size`` slots; one without records
    becomes a single physical batch of padding, so that its step is ordinary noise.

    reserve: called before each logical batch; writes and syncs the ledger line.
    announce: called with the notice of each physical batch before it is handed out.
    """

    def __init__(
        self,
        n_records: int,
        plan: PrivacyPlan,
        *,
        num_steps: int,
        physical_batch_size: int,
        reserve: Callable[[], None],
        announce: Callable[[BatchNotice], None],
    ) -> None:
        positive_int(n_records=n_records, physical_batch_size=physical_batch_size)
        self._n_records = n_records
        self._sampling_rate = plan.sampling_rate
        self._num_steps = num_steps
        self._physical_batch_size = physical_batch_size
        self._reserve = reserve
        self._announce = announce
        self._random = SecureRandom()

    def __iter__(self) -> Iterator[PhysicalBatch]:
        for _ in range(self._num_steps):
            self._reserve()
            coins = self._random.bernoulli(self._sampling_rate, self._n_records)
            for batch in cut(np.flatnonzero(coins), self._physical_batch_size):
                self._announce(batch.notice)
                yield batch


def cut(indices: np.ndarray, physical_batch_size: int) -> list[PhysicalBatch]:
    """A logical batch as physical batches of one shape; at least one, the last one marked."""
    starts = range(0, max(len(indices), 1), physical_batch_size)
    return [
        PhysicalBatch(
            indices[start : start + physical_batch_size],
            physical_batch_size,
            is_first=start == 0,
            is_last=start == starts[-1],
        )
        for start in starts
    ]
