"""Poisson sampling: the law of coins and choices, the cut into batches, the order of events."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpengine.errors import PrivacyError
from dpengine.mechanism.batches import PhysicalBatch, cut
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.mechanism.sampling import OnePass, PoissonSampler
from dpengine.mechanism.secure_random import SecureRandom

FALSE_ALARM = 1e-7


def plan(sampling_rate, unit="record", rows_per_unit=1):
    return PrivacyPlan(
        sampling_rate=sampling_rate,
        noise_multiplier=1.0,
        num_steps=10_000,
        max_grad_norm=1.0,
        delta=1e-5,
        public_dataset_size=1000,
        adjacency="add-remove",
        draws_per_record=1,
        trainable_parameters=1,
        unit=unit,
        rows_per_unit=rows_per_unit,
    )


def nothing(*_):
    pass


OPTIONS = {"num_steps": 1, "physical_batch_size": 8, "reserve": nothing, "announce": nothing}


def sampler(
    n_records=50,
    sampling_rate=0.3,
    *,
    num_steps=1,
    size=8,
    reserve=nothing,
    see=nothing,
    unit_ids=None,
    rows_per_unit=1,
    prefetch=0,
):
    """One of ``n_records`` units of one record, or of the units of ``unit_ids``."""
    return PoissonSampler(
        n_records if unit_ids is None else len(unit_ids),
        plan(sampling_rate, "record" if unit_ids is None else "unit", rows_per_unit),
        num_steps=num_steps,
        physical_batch_size=size,
        reserve=reserve,
        announce=see,
        unit_ids=unit_ids,
        prefetch=prefetch,
    )


def owners(sizes):
    """Unit ids [Σ sizes] in mixed order: unit u owns ``sizes[u]`` records."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


MIXED = owners([1, 2, 5, 100, 1] * 10)
"""Fifty units; the largest own a hundred records, the smallest one."""

UNITS = pytest.mark.parametrize("unit_ids", [None, MIXED], ids=["records", "units"])


def logical_batches(batches):
    """Indices [n, M] of each logical batch, put together from its physical batches."""
    logical, current = [], []
    for batch in batches:
        current.append(batch.indices)
        if batch.is_last:
            logical.append(np.concatenate(current))
            current = []
    assert not current
    return logical


def inclusions(sampling_rate, num_steps, unit_ids=None):
    """Bool [T, 50]: which of fifty units entered which logical batch."""
    included = np.zeros((num_steps, 50), dtype=bool)
    batches = sampler(50, sampling_rate, num_steps=num_steps, unit_ids=unit_ids)
    for step, indices in enumerate(logical_batches(batches)):
        units = indices[:, 0] if unit_ids is None else unit_ids[indices[:, 0]]
        assert len(set(units)) == len(units)
        included[step, units] = True
    return included


@UNITS
@pytest.mark.parametrize("sampling_rate", [0.02, 0.3, 0.9], ids="q={}".format)
def test_every_unit_enters_with_probability_q_however_many_records_it_has(sampling_rate, unit_ids):
    included = inclusions(sampling_rate, 4000, unit_ids)
    counts = included.sum(0)
    p_values = [stats.binomtest(int(count), 4000, sampling_rate).pvalue for count in counts]
    assert min(p_values) * len(p_values) > FALSE_ALARM
    assert stats.binomtest(int(counts.sum()), 50 * 4000, sampling_rate).pvalue > FALSE_ALARM


@UNITS
def test_units_enter_independently_of_each_other_and_of_the_step_before(unit_ids):
    n_units, num_steps = 50, 4000
    z = (inclusions(0.3, num_steps, unit_ids) - 0.3) / np.sqrt(0.3 * 0.7)
    pairs = (z.T @ z / np.sqrt(num_steps))[np.triu_indices(n_units, 1)]
    in_time = (z[1:] * z[:-1]).sum(0) / np.sqrt(num_steps - 1)
    for scores in (pairs, in_time):
        assert 2 * stats.norm.sf(np.abs(scores).max()) * len(scores) > FALSE_ALARM


@UNITS
def test_batch_sizes_are_binomial(unit_ids):
    # A fixed or shuffled size has variance 0, and independent coins have N q (1 - q).
    sizes = inclusions(0.3, 4000, unit_ids).sum(1)
    statistic = ((sizes - 15) ** 2).sum() / (50 * 0.3 * 0.7)
    chi2 = stats.chi2(4000)
    assert 2 * min(chi2.cdf(statistic), chi2.sf(statistic)) > FALSE_ALARM


@UNITS
def test_rate_one_takes_everyone_in_every_step(unit_ids):
    assert inclusions(1.0, 5, unit_ids).all()


def choices(n_records, rows_per_unit, num_steps, n_units=1):
    """Records [T, U, M] that each of U units, of ``n_records`` each, brings to each step."""
    batches = sampler(
        sampling_rate=1.0,
        num_steps=num_steps,
        size=n_units,
        unit_ids=np.repeat(np.arange(n_units), n_records),
        rows_per_unit=rows_per_unit,
    )
    own_number = np.stack(logical_batches(batches)) - n_records * np.arange(n_units)[:, None]
    assert ((own_number >= 0) & (own_number < n_records)).all()
    return own_number


def assert_equally_likely(outcomes, n_outcomes):
    counts = np.unique(outcomes, axis=0, return_counts=True)[1]
    counts = np.concatenate([counts, np.zeros(n_outcomes - len(counts))])  # fails if negative
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("n_records", "rows_per_unit"), [(2, 1), (7, 1), (5, 2), (4, 3), (3, 3)])
def test_a_unit_brings_each_ordered_choice_of_its_records_equally_often(n_records, rows_per_unit):
    chosen = choices(n_records, rows_per_unit, 2000, n_units=10).reshape(-1, rows_per_unit)
    assert_equally_likely(chosen, math.perm(n_records, rows_per_unit))


def test_a_small_unit_repeats_its_records_in_turns_of_equally_likely_order():
    chosen = choices(3, 7, 2000, n_units=10).reshape(-1, 7)
    assert (chosen[:, :3] == chosen[:, 3:6]).all()
    assert (chosen[:, 0] == chosen[:, 6]).all()
    assert_equally_likely(chosen, 3 * 2 * 1)


def test_a_choice_tells_nothing_of_the_one_before_or_of_the_neighbour():
    chosen = choices(3, 2, 6000, n_units=2)
    assert_equally_likely(np.concatenate([chosen[:-1:2, 0], chosen[1::2, 0]], 1), 6 * 6)
    assert_equally_likely(chosen.reshape(len(chosen), -1), 6 * 6)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    rows_per_unit=st.integers(1, 15),
    rate=st.sampled_from([0.3, 1.0]),
)
@settings(deadline=None)
def test_a_unit_fills_one_slot_with_its_own_records_only(sizes, rows_per_unit, rate):
    unit_ids = owners(sizes)
    options = {"unit_ids": unit_ids, "rows_per_unit": rows_per_unit}
    batches = list(sampler(sampling_rate=rate, size=2, num_steps=3, **options))
    for batch in batches:
        assert batch.indices.dtype == np.int64
        assert batch.indices.shape == (batch.notice.n_records.reveal(), rows_per_unit)
        assert (batch.n_slots, len(batch.indices) <= 2) == (2, True)
    for indices in logical_batches(batches):
        units = unit_ids[indices]
        assert (units == units[:, :1]).all()
        assert len(set(units[:, 0])) == len(units)
        for unit, chosen in zip(units[:, 0], indices, strict=True):
            turns = np.unique(chosen, return_counts=True)[1]
            assert len(turns) == min(sizes[unit], rows_per_unit)
            assert turns.max() - turns.min() <= 1


def test_ids_may_be_strings_and_have_gaps():
    names = np.array(["zoe", "al", "zoe", "bo"])
    for unit_ids in (names, np.array([900, -7, 900, 3])):
        batches = sampler(sampling_rate=1.0, unit_ids=unit_ids, rows_per_unit=2)
        (chosen,) = logical_batches(batches)
        assert sorted(map(sorted, chosen.tolist())) == [[0, 2], [1, 1], [3, 3]]


def test_the_ids_given_are_left_as_they_are():
    unit_ids = owners([3, 4])
    before = unit_ids.copy()
    list(sampler(sampling_rate=1.0, num_steps=9, unit_ids=unit_ids, rows_per_unit=2))
    assert np.array_equal(unit_ids, before)


def test_sixty_thousand_units_are_sampled_at_once_and_not_one_by_one():
    sizes = np.random.default_rng(0).integers(1, 20, 60_000)
    batches = sampler(
        sampling_rate=1.0, num_steps=5, size=60_000, unit_ids=owners(sizes), rows_per_unit=4
    )
    start = time.process_time()
    assert [batch.indices.shape for batch in batches] == [(60_000, 4)] * 5
    # A loop over single units takes several seconds for these five steps, arrays 0.06 s.
    assert time.process_time() - start < 0.6


def test_an_empty_logical_batch_is_one_batch_of_padding():
    announced = []
    batches = list(sampler(1, 1e-15, num_steps=3, size=4, see=announced.append))
    assert [(len(b.indices), b.n_slots, b.is_last) for b in batches] == [(0, 4, True)] * 3
    assert [notice.n_records.reveal() for notice in announced] == [0, 0, 0]


@given(n_indices=st.integers(0, 60), size=st.integers(1, 20))
@settings(deadline=None)
def test_cut_covers_each_unit_once_in_batches_of_one_shape(n_indices, size):
    indices = np.arange(2 * n_indices).reshape(n_indices, 2) * 7
    batches = cut(indices, size)
    assert np.array_equal(np.concatenate([batch.indices for batch in batches]), indices)
    assert {batch.n_slots for batch in batches} == {size}
    assert all(len(batch.indices) == size for batch in batches[:-1])
    assert len(batches[-1].indices) <= size
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert [batch.is_first for batch in batches] == [True] + [False] * (len(batches) - 1)
    assert len(batches) == max(1, -(-n_indices // size))


def test_a_notice_says_what_the_batch_holds():
    batch = PhysicalBatch(np.array([[3, 4, 5], [1, 0, 1]]), 8, is_first=False, is_last=False)
    notice = batch.notice
    assert (notice.n_records.reveal(), notice.n_slots) == (2, 8)
    assert not any(value is True for value in vars(notice).values())


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_there_are_num_steps_logical_batches_and_reservations(num_steps):
    reservations = []
    batches = sampler(num_steps=num_steps, reserve=lambda: reservations.append(1))
    assert len(logical_batches(batches)) == len(reservations) == num_steps


@pytest.fixture
def events(monkeypatch):
    """The order of coins, of what the sampler is given to call, and of what it hands out."""
    events = []
    words = SecureRandom.words

    def recorded(self, count):
        events.append("coins")
        return words(self, count)

    monkeypatch.setattr(SecureRandom, "words", recorded)
    return events


@pytest.mark.parametrize("unit_ids", [None, owners([3] * 20)], ids=["records", "units"])
def test_each_step_is_reserved_before_its_coins_and_announced_before_it_is_handed_out(
    events, unit_ids
):
    batches = sampler(
        20,
        1.0,
        unit_ids=unit_ids,
        num_steps=3,
        reserve=lambda: events.append("reserve"),
        see=lambda notice: events.append(("announce", notice.n_records.reveal())),
    )
    for batch in batches:
        events.append(("batch", len(batch.indices)))
    one_step = ["reserve", "coins", "coins"]  # for the units, and for their records
    for n_records in (8, 8, 4):
        one_step += [("announce", n_records), ("batch", n_records)]
    assert events == one_step * 3


def test_a_step_is_not_reserved_before_it_is_asked_for():
    reservations = []
    batches = iter(sampler(num_steps=2, size=50, reserve=lambda: reservations.append(1)))
    assert len(reservations) == 0
    next(batches)
    assert len(reservations) == 1


def test_a_refused_reservation_draws_no_coins_and_announces_nothing(events):
    def refuse():
        raise PrivacyError("spent")

    announced = []
    with pytest.raises(PrivacyError, match="spent"):
        next(iter(sampler(reserve=refuse, see=announced.append)))
    assert events == announced == []


def test_seeds_and_a_second_pass_do_not_repeat_the_coins():
    def draw(batches):
        torch.manual_seed(0)
        np.random.seed(0)
        return np.concatenate(logical_batches(batches)).tolist()

    state = torch.get_rng_state()
    ten_each = {"unit_ids": owners([10] * 50), "sampling_rate": 1.0}
    for options in ({"n_records": 500, "sampling_rate": 0.5}, ten_each):
        twice = sampler(**options)
        draws = [draw(twice), draw(twice), draw(sampler(**options))]
        assert all(a != b for a, b in pairwise(draws))
    torch.set_rng_state(state)


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sampler(size=0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        sampler(n_records=-1)


def test_without_records_every_batch_is_padding():
    """An error would tell such data from others."""
    assert [len(batch.indices) for batch in sampler(n_records=0, num_steps=3)] == [0, 0, 0]


def test_a_loader_that_looks_ahead_is_counted_past_the_end_too():
    """Each request is one announcement, so that the capture knows how far ahead the loader is."""
    announced = []
    batches = iter(
        sampler(1, 1.0, num_steps=2, see=lambda notice, *_: announced.append(notice), prefetch=3)
    )
    requests = [next(batches, None) for _ in range(5)]
    assert [batch and batch.notice for batch in requests] == announced
    assert [notice is None for notice in announced] == [False, False, True, True, True]


def test_without_prefetching_nothing_is_announced_past_the_end():
    announced = []
    assert len(list(sampler(1, 1.0, num_steps=2, see=announced.append))) == len(announced) == 2


def test_an_iterator_that_failed_hands_out_nothing_more():
    def refuse(_):
        raise PrivacyError("not used")

    batches = iter(sampler(20, 1.0, num_steps=2, see=refuse))
    with pytest.raises(PrivacyError, match="not used"):
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_of_torch_takes_physical_batches(num_workers):
    class Lookup(torch.utils.data.Dataset):
        def __getitem__(self, batch):
            return batch.indices

    announced = []
    see = lambda notice, *_: announced.append(notice)  # noqa: E731
    batches = sampler(20, 1.0, num_steps=3, see=see, prefetch=2 * num_workers)
    loader = torch.utils.data.DataLoader(
        Lookup(), sampler=batches, batch_size=None, num_workers=num_workers
    )
    ahead = []
    for count, indices in enumerate(loader, start=1):
        assert len(indices) == announced[count - 1].n_records.reveal()
        ahead.append(len(announced) - count)
    assert ahead == [batches.prefetch] * 9


def test_what_a_batch_prints_is_the_same_whatever_was_drawn():
    """A traceback or a log shows it; slots and ends tell how many units a Poisson batch has."""
    batches = [
        b
        for n in (0, 1, 7, 37)
        for pad in (False, True)
        for b in cut(np.arange(n)[:, None], 8, pad)
    ]
    order = OnePass([[3, 1], [2]], 5, physical_batch_size=None, reserve=nothing, announce=nothing)
    assert {repr(b) for b in (*batches, *order)} == {"PhysicalBatch(private)"}
    assert {f"{b}" for b in batches} == {str(b) for b in batches} == {"PhysicalBatch(private)"}
    assert len({repr(b.notice) for b in batches if not b.is_public}) == 1
    assert not any("is_last" in repr(b.notice) for b in (*batches, *order))


def test_the_number_of_physical_batches_is_not_told():
    with pytest.raises(TypeError, match="len"):
        len(sampler())


def test_what_is_sampled_is_what_the_plan_protects():
    """Coins for records, grouped afterwards, are not to be had."""
    with pytest.raises(ValueError, match="unit_ids must be given"):
        PoissonSampler(4, plan(0.5, "unit"), **OPTIONS)
    with pytest.raises(ValueError, match="unit_ids must be left out"):
        PoissonSampler(4, plan(0.5), unit_ids=np.arange(4), **OPTIONS)


@pytest.mark.parametrize("unit_ids", [np.zeros(3, int), np.zeros((4, 1), int), 7])
def test_ids_that_are_not_one_for_each_record_are_refused(unit_ids):
    with pytest.raises(ValueError, match="unit_ids must be one-dimensional"):
        PoissonSampler(4, plan(0.5, "unit"), unit_ids=unit_ids, **OPTIONS)


@pytest.mark.parametrize("prefetch", [-1, 1.5, True])
def test_a_prefetch_that_is_no_count_is_refused(prefetch):
    with pytest.raises(ValueError, match="prefetch must be"):
        sampler(prefetch=prefetch)
