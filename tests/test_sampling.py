"""Poisson sampling: the law of the coins, the cut into batches, the order of events."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpengine.errors import PrivacyError
from dpengine.plan import PrivacyPlan
from dpengine.sampling import PhysicalBatch, PoissonSampler, cut
from dpengine.secure_random import SecureRandom

FALSE_ALARM = 1e-7


def plan(sampling_rate):
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
    )


def nothing(*_):
    pass


def sampler(n_records=50, sampling_rate=0.3, *, num_steps=1, size=8, reserve=nothing, see=nothing):
    return PoissonSampler(
        n_records,
        plan(sampling_rate),
        num_steps=num_steps,
        physical_batch_size=size,
        reserve=reserve,
        announce=see,
    )


def logical_batches(batches):
    """Indices of each logical batch, put together from its physical batches."""
    logical, current = [], []
    for batch in batches:
        current.append(batch.indices)
        if batch.is_last:
            logical.append(np.concatenate(current))
            current = []
    assert not current
    return logical


def inclusions(n_records, sampling_rate, num_steps):
    """Bool [T, N]: who entered which logical batch."""
    included = np.zeros((num_steps, n_records), dtype=bool)
    batches = sampler(n_records, sampling_rate, num_steps=num_steps)
    for step, indices in enumerate(logical_batches(batches)):
        included[step, indices] = True
    return included


@pytest.mark.parametrize("sampling_rate", [0.02, 0.3, 0.9], ids="q={}".format)
def test_every_record_enters_with_probability_q(sampling_rate):
    included = inclusions(50, sampling_rate, 4000)
    counts = included.sum(0)
    p_values = [stats.binomtest(int(count), 4000, sampling_rate).pvalue for count in counts]
    assert min(p_values) * len(p_values) > FALSE_ALARM
    assert stats.binomtest(int(counts.sum()), 50 * 4000, sampling_rate).pvalue > FALSE_ALARM


def test_records_enter_independently_of_each_other_and_of_the_step_before():
    n_records, num_steps = 50, 4000
    z = (inclusions(n_records, 0.3, num_steps) - 0.3) / np.sqrt(0.3 * 0.7)
    pairs = (z.T @ z / np.sqrt(num_steps))[np.triu_indices(n_records, 1)]
    in_time = (z[1:] * z[:-1]).sum(0) / np.sqrt(num_steps - 1)
    for scores in (pairs, in_time):
        assert 2 * stats.norm.sf(np.abs(scores).max()) * len(scores) > FALSE_ALARM


def test_batch_sizes_are_binomial():
    # A fixed or shuffled size has variance 0, and independent coins have N q (1 - q).
    sizes = inclusions(50, 0.3, 4000).sum(1)
    statistic = ((sizes - 15) ** 2).sum() / (50 * 0.3 * 0.7)
    chi2 = stats.chi2(4000)
    assert 2 * min(chi2.cdf(statistic), chi2.sf(statistic)) > FALSE_ALARM


def test_rate_one_takes_everyone_in_every_step():
    assert inclusions(50, 1.0, 5).all()


def test_an_empty_logical_batch_is_one_batch_of_padding():
    announced = []
    batches = list(sampler(1, 1e-15, num_steps=3, size=4, see=announced.append))
    assert [(len(b.indices), b.n_slots, b.is_last) for b in batches] == [(0, 4, True)] * 3
    assert [notice.n_records for notice in announced] == [0, 0, 0]


@given(n_indices=st.integers(0, 60), size=st.integers(1, 20))
@settings(deadline=None)
def test_cut_covers_each_index_once_in_batches_of_one_shape(n_indices, size):
    indices = np.arange(n_indices) * 7
    batches = cut(indices, size)
    assert np.array_equal(np.concatenate([batch.indices for batch in batches]), indices)
    assert {batch.n_slots for batch in batches} == {size}
    assert all(len(batch.indices) == size for batch in batches[:-1])
    assert len(batches[-1].indices) <= size
    assert [batch.is_last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert [batch.is_first for batch in batches] == [True] + [False] * (len(batches) - 1)
    assert len(batches) == max(1, -(-n_indices // size))


def test_a_notice_says_what_the_batch_holds():
    notice = PhysicalBatch(np.array([3, 1]), 8, is_first=False, is_last=False).notice
    assert (notice.n_records, notice.n_slots) == (2, 8)
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


def test_each_step_is_reserved_before_its_coins_and_announced_before_it_is_handed_out(events):
    batches = sampler(
        20,
        1.0,
        num_steps=3,
        reserve=lambda: events.append("reserve"),
        see=lambda notice: events.append(("announce", notice.n_records)),
    )
    for batch in batches:
        events.append(("batch", len(batch.indices)))
    one_step = ["reserve", "coins"]
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
        return tuple(np.concatenate(logical_batches(batches)))

    state = torch.get_rng_state()
    twice = sampler(500, 0.5)
    draws = [draw(twice), draw(twice), draw(sampler(500, 0.5))]
    torch.set_rng_state(state)
    assert all(a != b for a, b in pairwise(draws))


@pytest.mark.parametrize("name", ["n_records", "size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sampler(**{name: 0})
