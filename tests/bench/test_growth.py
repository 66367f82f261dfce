"""Curves of growth: their lines, the specification they are checked by, and two processes."""

from functools import partial

import numpy as np
import pytest
import torch

from bench import growth, training, turns, two_processes
from bench.growth import Point, Quantity
from bench.report import figures

TINY = Point(training.small(size=4), records=2)


def test_the_line_and_what_it_misses():
    straight = growth.fit_line([1, 2, 4], [5.0, 7.0, 11.0])
    assert straight["slope"] == pytest.approx(2) and straight["intercept"] == pytest.approx(3)
    assert straight["misses"] < 1e-12
    # 0, 1, 0 at 0, 1, 2: the best line is flat at 1/3 and misses by 1/3, 2/3, 1/3.
    bent = growth.fit_line([0, 1, 2], [0.0, 1.0, 0.0])
    assert bent["misses"] == pytest.approx(np.sqrt((1 + 4 + 1) / 27) * 3)
    # Nothing is added: no mean to miss.
    assert growth.fit_line([1, 2, 3], [0, 0, 0])["misses"] == 0


@pytest.mark.parametrize("draws", [1, 2])
def test_our_update_is_that_of_a_loop_over_records(draws):
    point = Point(training.small(size=4), records=3, draws=draws)
    expected = growth.expected(point)
    found = growth.update(point, expected.max_grad_norm)
    growth.check(point, found, expected)
    with pytest.raises(AssertionError, match="is off by"):
        growth.check(point, found * (1 + 1e-5), expected)


def size(point, name):
    """What is varied under a name, seen in the rows and in the model."""
    rows = point.task.inputs(point.records * point.draws)[0]
    if name == "tokens":
        return rows.shape[-1] * rows.shape[-2]
    if name in ("records", "draws"):
        return len(rows) // (point.draws if name == "records" else point.records)
    ranks = [m.r["default"] for m in point.task.make_model().modules() if hasattr(m, "lora_A")]
    return len(ranks) if name == "adapters" else ranks[0]


@pytest.mark.parametrize("name", growth.QUANTITIES)
def test_a_quantity_is_what_its_axis_says_and_nothing_else_changes(name):
    quantity = growth.QUANTITIES[name]
    assert 1 < len(quantity.values) < len(quantity.all_values)
    points = [quantity.at(value) for value in quantity.values]
    assert [size(point, name) for point in points] == list(quantity.values)
    for other in set(growth.QUANTITIES) - {name}:
        assert len({size(point, other) for point in points}) == 1


@pytest.fixture
def measured(monkeypatch):
    """Curves over two sizes of a batch, and entries of the other kind."""
    tiny = Quantity("records N", lambda n: Point(TINY.task, n), (1, 2), (1, 2))
    monkeypatch.setitem(growth.QUANTITIES, "records", tiny)
    curves = growth.measure("records", (1, 2), rounds=2)
    gain = turns.ratio([2.0, 2.0], [1.0, 1.5])
    threads = {"1 process": 2, "each of 2": 1}
    processes = {"records": 2, "threads": threads, "throughput_over_one_process": gain}
    return {"results": {"growth": [curves] * 5, "processes": [processes]}}


def test_curves_are_measured_and_drawn(measured, tmp_path):
    curves = measured["results"]["growth"][0]
    for impl in growth.IMPLS:
        steps = curves["steps"][impl]
        assert len(steps["time"]["ratios"]) == 2
        assert all(ratio["rounds"] == 2 for ratio in steps["time"]["ratios"])
        one, two = steps["flops"]["counts"]
        assert one < two <= 2 * one
    assert curves["steps"]["non-private"]["time"]["ratios"][0]["median"] == 1
    ours, plain = (np.array(curves["steps"][impl]["ops"]["counts"]) for impl in growth.IMPLS[::-1])
    assert curves["privacy_adds"]["ops"]["counts"] == list(ours - plain)
    figures.growth(measured, tmp_path / "figures" / "growth.png")
    assert (tmp_path / "figures" / "growth.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.QUANTITIES)
def test_what_privacy_adds_is_no_product(name):
    """Per-record gradients are the same products as their sum, in other places."""
    for value in growth.QUANTITIES[name].values:
        point = growth.QUANTITIES[name].at(value)
        plain, ours = (growth.count_flops(growth.step(point, impl)) for impl in growth.IMPLS)
        assert ours == plain


def test_one_process_of_the_mechanism_below_the_optimizer_is_right():
    """Where some records are clipped and others, which show their scale, are not."""
    point = Point(TINY.task, records=3)
    expected = growth.expected(point)
    sgd = partial(torch.optim.SGD, lr=growth.FAST)
    mechanism = {"noise_multiplier": 0.0, "max_grad_norm": expected.max_grad_norm}
    started = two_processes.start(point.task, sgd, point.records, several=False, **mechanism)
    before = [param.detach().clone() for param in started.params]
    started.step(*point.task.inputs(point.records))
    pairs = zip(before, started.params, strict=True)
    taken = torch.cat([(old.double() - new.detach()).flatten() for old, new in pairs])
    growth.check(point, taken / growth.FAST, expected)


@pytest.mark.slow
def test_two_processes_make_the_update_of_one():
    point = Point(TINY.task, records=4)
    expected = growth.expected(point)
    first, second = two_processes.updates(4, point.records, expected.max_grad_norm)
    assert first == second
    growth.check(point, torch.tensor(first, dtype=torch.float64), expected)


@pytest.mark.slow
def test_both_are_timed_in_every_round():
    taken = two_processes.seconds(4, [2, 4], rounds=3, threads=2)
    assert list(taken) == [2, 4]
    for seconds in taken.values():
        assert {name: len(times) for name, times in seconds.items()} == {
            two_processes.ONE: 3,
            two_processes.TWO: 3,
        }
        assert min(map(min, seconds.values())) > 0
