"""What is timed and what fits, of steps whose answers are known."""

import math

import pytest

from bench import peers, steps
from bench.peers import NON_PRIVATE, OURS, PEERS


def test_phases_are_timed_apart(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def phase(*_):
            clock[0] += seconds

        return phase

    training = peers.Training(takes(7.0), [], {"forward": takes(1.0), "clip": takes(2.5)})
    phased = steps.Phased(training, ())
    phased()
    phased()
    assert phased.seconds == {"forward": [1.0, 1.0], "clip": [2.5, 2.5]}


@pytest.mark.parametrize(
    "need",
    [
        lambda n: 10.0 + 3 * n,
        lambda n: 10.0 + 3 * n + (40 if n < 8 else 0),  # other operators for few records
        lambda n: max(90.0, 5.0 * n),  # what comes before the step weighs more
        lambda n: 1.0 + n**1.5,
        lambda n: 2.0 * n if n <= 37 else math.inf,  # a device that ran out
        lambda n: 60.0 + 50 * n,
    ],
)
@pytest.mark.parametrize("limit", [120.0, 1000.0, 5000.0])
def test_the_last_that_fits_is_that_of_trying_all(need, limit):
    best = max(n for n in range(1, 6000) if need(n) <= limit)
    tried = []

    def counted(n):
        tried.append(n)
        return need(n)

    assert steps.last_that_fits(counted, limit) == (best, need(best), need(best + 1))
    assert len(tried) == len(set(tried)) < 40


def test_a_limit_below_one_record_is_refused():
    with pytest.raises(ValueError, match="must hold one record, 100"):
        steps.last_that_fits(lambda n: 100 * n, 99)


def test_memory_above_non_private_is_told_in_gradients_of_all_records():
    """On images of 4 x 4 pixels the activations are small and hide nothing."""
    case = steps.Case(batch=16, rank=64, size=4)
    found = steps.peaks(case, {name: PEERS[name] for name in (NON_PRIVATE, OURS)})
    # to_q, to_k, to_v and to_out.0 of three layers of 32 channels and four of 64.
    assert found["parameters"] == 4 * 64 * 2 * (3 * 32 + 4 * 64)
    assert found["above_non_private"][NON_PRIVATE] == 0
    assert 0.5 < found["above_non_private"][OURS] <= 1.1
