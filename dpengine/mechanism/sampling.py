"""Poisson sampling of units, cut into physical batches of one constant shape."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..errors import PrivacyError, positive_int
from .batches import BatchNotice, PhysicalBatch, cut
from .plan import Unit
from .secure_random import SecureRandom
from .units import number_units


class SamplingPlan(Protocol):
    """What of a plan tells how batches are drawn; a ``PrivacyPlan`` has it."""

    @property
    def sampling_rate(self) -> float: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def rows_per_unit(self) -> int: ...


class PoissonSampler:
    """Draws ``num_steps`` logical batches: each unit enters each one with probability q.

    A unit is one record, or with ``unit_ids`` all records of one person. The coins are tossed for
    units, never for records: a person of a hundred images enters as often as one of a single
    image, and either brings ``plan.rows_per_unit`` records, drawn after the coin. The coins and
    draws are secret, fresh and 64 bits wide. Every logical batch is reserved before its coins are
    tossed, and cut into physical batches of ``physical_batch_size`` slots; one without units
    becomes a single physical batch of padding, so that its step is ordinary noise. There is no
    length, because the number of physical batches tells how many units entered.

    unit_ids: [n_records], whose each record is (``units``); given if and only if ``plan.unit`` is
        `unit`, so that what is sampled is what the plan promises to protect. Private.
    reserve: called before each logical batch; writes and syncs the ledger line.
    announce: called with the notice of each physical batch before it is handed out, and, where
        ``prefetch`` is above 0, with ``prefetch`` too, and with None each time that a loader asks
        again after the last one.
    prefetch: how many batches a loader asks for beyond the one at work: workers times
        `prefetch_factor` in torch's DataLoader, which asks on, once for each batch it has handed
        over, after the last one too. It must hand batches over in the order in which it asked for
        them, as DataLoader does unless told `in_order=False`. What was asked for is charged, used
        or not.
    pad: whether each physical batch has ``physical_batch_size`` slots; else it has as many as
        units, and one at least.

    Raises ValueError for sizes below 1, and for unit_ids that the plan does not go with.
    """

    def __init__(
        self,
        n_records: int,
        plan: SamplingPlan,
        *,
        num_steps: int,
        physical_batch_size: int,
        reserve: Callable[[], None],
        announce: Callable[..., None],
        unit_ids: np.ndarray | None = None,
        prefetch: int = 0,
        pad: bool = True,
    ) -> None:
        positive_int(physical_batch_size=physical_batch_size)
        # No records are as good as some: an error would tell which.
        for name, number in {"n_records": n_records, "prefetch": prefetch}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {number}")
        _check_unit(plan, unit_ids, n_records)
        self.prefetch = prefetch
        self._units = _Units(np.arange(n_records) if unit_ids is None else number_units(unit_ids))
        self._sampling_rate = plan.sampling_rate
        self._rows_per_unit = plan.rows_per_unit
        self._num_steps = num_steps
        self._physical_batch_size = physical_batch_size
        self._reserve = reserve
        self._announce = announce
        self._pad = pad
        self._random = SecureRandom()

    def __iter__(self) -> Iterator[PhysicalBatch]:
        return CallAtEnd(self._batches(), self._past_the_end)

    def _batches(self) -> Iterator[PhysicalBatch]:
        for _ in range(self._num_steps):
            self._reserve()
            coins = self._random.bernoulli(self._sampling_rate, len(self._units))
            indices = self._units.choose(np.flatnonzero(coins), self._rows_per_unit, self._random)
            for batch in cut(indices, self._physical_batch_size, self._pad):
                self._tell(batch.notice)
                yield batch

    def _past_the_end(self) -> None:
        if self.prefetch > 0:
            self._tell(None)

    def _tell(self, notice: BatchNotice | None) -> None:
        if self.prefetch > 0:
            self._announce(notice, self.prefetch)
        else:
            self._announce(notice)


class CallAtEnd:
    """An iterator that calls ``past_the_end`` whenever it is asked for more than there is."""

    def __init__(self, batches: Iterator[PhysicalBatch], past_the_end: Callable[[], None]) -> None:
        self._batches = batches
        self._past_the_end = past_the_end

    def __iter__(self) -> Iterator[PhysicalBatch]:
        return self

    def __next__(self) -> PhysicalBatch:
        try:
            return next(self._batches)
        except StopIteration:
            self._past_the_end()
            raise


class _Units:
    """Which records belong to which unit, and secret uniform choices among them."""

    def __init__(self, unit_ids: np.ndarray) -> None:
        _, units, self._sizes = np.unique(unit_ids, return_inverse=True, return_counts=True)
        self._starts = np.cumsum(self._sizes) - self._sizes
        # Records of one unit side by side. Their order within it is the last choice's, and free.
        self._records = np.argsort(units, kind="stable")

    def __len__(self) -> int:
        return len(self._sizes)

    def choose(self, units: np.ndarray, n: int, random: SecureRandom) -> np.ndarray:
        """``n`` records of each of ``units``, distinct while they last.  int64 [len(units), n]

        The first n steps of a Fisher-Yates shuffle (Knuth, The Art of Computer Programming 2,
        3.4.2, algorithm P), of all units at once: place m swaps with a place uniform among those
        from m on, so a unit's records are n of its own without replacement, in uniformly random
        order, whatever the order before. A unit of s < n records is shuffled whole and taken in
        turns: each record floor(n / s) or ceil(n / s) times.

        A place is a 64-bit word modulo the number r of places. Each has probability 1/r within
        2⁻⁶⁴, so the choice is within n·s·2⁻⁶⁴ of uniform in total variation. The guarantee does not
        rest on it: whatever a unit's records, its contribution is clipped to one bound, and no
        other unit's words, records or places depend on them.
        """
        starts, sizes = self._starts[units], self._sizes[units]
        words = random.words(len(units) * n).reshape(len(units), n)
        for m in range(n):
            # A unit without a place m swaps its last record with itself.
            place = np.minimum(m, sizes - 1)
            steps = words[:, m] % (sizes - place).astype(np.uint64)
            here, there = starts + place, starts + place + steps.astype(np.int64)
            records = self._records
            records[here], records[there] = records[there], records[here]
        return self._records[starts[:, None] + np.arange(n) % sizes[:, None]]


class OnePass:
    """A pass over all records in an order of the caller's own, each record in one batch at most.

    order: the batches of each pass, as lists of indices. It must not depend on the records.
    reserve: called before each pass; announce: with the notice of each physical batch.
    physical_batch_size: cut batches into physical batches of at most as many records; None leaves
        them whole, and to the optimizer's signals where a logical batch ends.
    pad: as in ``PoissonSampler``. is_distinct: refuse a record that comes twice in a pass; False
    for an order that nothing is claimed of.

    Guarantee: replacing one record by one that contributes nothing moves the sum of one batch of
    the pass by at most C, and no other sum of the pass. A sum that several batches of a pass were
    added to holds the record once, and none goes on into the next pass. So a pass costs what one
    Gaussian mechanism on all records costs, without amplification; adding or removing a record
    would move others to other batches, and is not covered. The batches have the
    sizes that the order gives them, which are public.

    Raises PrivacyError where a record comes a second time in one pass, before its batch is used.
    """

    def __init__(
        self,
        order: Iterable[list[int]],
        n_records: int,
        *,
        physical_batch_size: int | None,
        reserve: Callable[[], None],
        announce: Callable[..., None],
        pad: bool = False,
        is_distinct: bool = True,
    ) -> None:
        self._order, self._n_records, self._is_distinct = order, n_records, is_distinct
        self._physical_batch_size, self._pad = physical_batch_size, pad
        self._reserve, self._announce = reserve, announce

    def __iter__(self) -> Iterator[PhysicalBatch]:
        self._reserve()
        seen = np.zeros(self._n_records, bool)
        is_first_of_pass, this_pass = True, object()
        for chosen in self._order:
            indices = np.asarray(chosen, dtype=np.int64).reshape(-1, 1)
            if self._is_distinct:
                _check_distinct(indices, seen)
                seen[indices] = True
            for batch in self._cut(indices, is_first_of_pass, this_pass):
                self._announce(batch.notice)
                yield batch
            is_first_of_pass = False

    def _cut(
        self, indices: np.ndarray, is_first_of_pass: bool, this_pass: object
    ) -> list[PhysicalBatch]:
        if self._physical_batch_size is None:
            n_slots = max(len(indices), 1)
            batches = [PhysicalBatch(indices, n_slots, is_first_of_pass, None, this_pass)]
        else:
            batches = cut(indices, self._physical_batch_size, self._pad)
        is_public = self._pad or self._is_distinct
        return [replace(batch, is_public=is_public) for batch in batches]


def _check_distinct(indices: np.ndarray, seen: np.ndarray) -> None:
    if (indices < 0).any():
        raise PrivacyError(
            "the loader's order numbers records from the end; number them from 0, so that none "
            "comes twice in a pass under two numbers"
        )
    if len(np.unique(indices)) < len(indices) or seen[indices].any():
        raise PrivacyError(
            "the loader's order has a record twice in one pass, which costs more than was charged; "
            "sample without replacement, or leave poisson_sampling at True"
        )


def _check_unit(plan: SamplingPlan, unit_ids: np.ndarray | None, n_records: int) -> None:
    if plan.unit == "unit" and unit_ids is None:
        raise ValueError(
            "unit_ids must be given where the plan's unit is 'unit': coins tossed for records and "
            "grouped afterwards would not have the probability that is accounted for"
        )
    if plan.unit == "record" and unit_ids is not None:
        raise ValueError(
            "unit_ids must be left out where the plan's unit is 'record'; make the plan with "
            "unit='unit' and sizes that count units"
        )
    if unit_ids is not None and np.shape(unit_ids) != (n_records,):
        raise ValueError("unit_ids must be one-dimensional, with one id for each record")
