"""Peers that take turns, and the ratios of their times."""

from functools import partial

import pytest

from bench import turns
from bench.turns import Turns


def test_steps_take_turns_and_each_comes_first_as_often():
    order = []
    peers = Turns({name: partial(order.append, name) for name in "abc"})
    for _ in range(3):
        peers.round()
    assert "".join(order) == "abcbcacab"
    assert [len(taken) for taken in peers.seconds.values()] == [3, 3, 3]


def test_rounds_to_warm_up_run_and_do_not_count():
    order = []
    peers = Turns({name: partial(order.append, name) for name in "ab"})
    peers.warm_up(2)
    assert "".join(order) == "abab" and peers.seconds == {"a": [], "b": []}


def test_a_ratio_has_the_spread_of_the_rounds():
    found = turns.ratio([2.0, 6.0, 4.0, 8.0], [2.0, 3.0, 2.0, 2.0])
    # Ratios within rounds 1, 2, 2 and 4: a quarter of the way from the first to the last is 1.75.
    assert (found["median"], found["quartile_1"], found["quartile_3"]) == (2.0, 1.75, 2.5)
    assert (found["least"], found["most"]) == (1.0, 4.0)
    assert found["of_fastest"] == 1.0 and found["rounds"] == 4


def test_one_round_has_a_ratio_without_a_spread():
    found = turns.ratio([3.0], [2.0])
    assert found["median"] == found["quartile_1"] == found["quartile_3"] == 1.5


def test_a_ratio_is_taken_within_a_round_and_not_across():
    with pytest.raises(ValueError, match="zip"):
        turns.ratio([1.0, 2.0], [1.0])


def test_times_are_those_of_the_peer(monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 3.0])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    peers = Turns({"short": int, "long": int})
    peers.round()
    assert peers.seconds == {"short": [0.5], "long": [2.0]}
    assert peers.median_ms() == {"short": 500.0, "long": 2000.0}
    assert peers.ratio("long", "short")["median"] == 4.0


def test_a_turn_ends_when_the_device_is_done(monkeypatch):
    clock = [0.0]

    def wait():
        clock[0] += 5.0

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(turns, "wait", wait)
    peers = Turns({"starts a kernel": int})
    peers.round()
    assert peers.seconds == {"starts a kernel": [5.0]}
