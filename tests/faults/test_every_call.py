"""Each call that writes a file fails, is the last one, or is followed by a power failure."""

import random
import shutil

import pytest


@pytest.fixture(scope="session")
def calls(runs) -> list[str]:
    """The calls of `os` that a run makes from its start to its report: over a hundred."""
    runs.fresh()
    names = runs.list_calls()
    assert len(names) > 100 and names.count("charge") == runs.plan.num_steps
    return names


@pytest.fixture(scope="session")
def num_calls(calls) -> int:
    return len(calls)


def some(num_calls: int, first: int) -> list[int]:
    return list(range(first, num_calls, num_calls // 2))


def check_fault(runs, faults, number: int) -> None:
    """Killed or failing at call ``number``, a run has charged what it drew, and can be finished."""
    runs.fresh()
    fail, statuses = faults
    assert runs.attempt(runs.calls(number, fail)) in statuses
    runs.check_charged()
    runs.finish()


@pytest.mark.parametrize("fault", ["kill", "input_output_error", "disk_full"])
def test_a_fault_at_some_calls(runs, num_calls, faults, fault):
    for number in some(num_calls, 5 + 11 * list(faults).index(fault)):
        check_fault(runs, faults[fault], number)


def test_a_kill_while_a_step_is_charged(runs, calls, faults):
    """The line is torn: its step is not charged, and must not have been drawn."""
    number = calls.index("charge") + 1
    check_fault(runs, faults["kill"], number)
    assert runs.drawn == runs.plan.num_steps  # what was torn was not lost


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "input_output_error", "disk_full"])
def test_a_fault_at_every_call(runs, num_calls, faults, fault):
    for number in range(1, num_calls + 1):
        check_fault(runs, faults[fault], number)


def lose_power(runs, number: int, chance: random.Random | None) -> None:
    """Without power behind call ``number``, a run goes on from what its disk has kept."""
    runs.fresh()
    after = runs.root.with_name("survived")
    shutil.rmtree(after, ignore_errors=True)
    assert runs.attempt(runs.disk(number, after, chance)) == runs.KILLED
    shutil.rmtree(runs.root)
    after.rename(runs.root)
    runs.check_charged()
    runs.finish()


def test_a_power_failure_behind_some_calls(runs, num_calls):
    for number in (num_calls // 3, num_calls // 2 + 1):
        lose_power(runs, number, None)
    for number in (num_calls // 4, num_calls - 9):
        lose_power(runs, number, random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_power_failure_behind_every_call(runs, num_calls, seed):
    """All that was not synced is lost; or with a seed, each name and file's end by a coin."""
    for number in range(1, num_calls + 1):
        lose_power(runs, number, None if seed is None else random.Random(1000 * seed + number))
