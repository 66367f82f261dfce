"""SIGKILL at random moments of real runs: nothing is drawn that is not charged."""

import os
import random
import signal
import time

import pytest

from dpengine.run.ledger import read


def kill_at_random(runs, num_kills: int, num_steps: int, seconds: float, seed: int) -> None:
    """Kill attempts of runs that go on where the one before was killed.

    After each kill the steps charged are at least those drawn, at most a block more for each
    attempt, and within the plan; the newest generation is whole; and they never become fewer.
    """
    chance, charged = random.Random(seed), 0
    runs.fresh(num_steps)
    while num_kills > 0:
        child = runs.start()
        time.sleep(seconds * chance.random())
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = runs.check_charged()
        assert charged <= now
        charged = now
        if status == -signal.SIGKILL:
            num_kills -= 1
            continue
        # It had ended already. It may also have lost all its steps before its first checkpoint.
        if status == 0:
            runs.check_finished()
        else:
            assert status == runs.REFUSED and charged == num_steps
        runs.fresh(num_steps)
        charged = 0


def test_a_few_kills(runs):
    kill_at_random(runs, 8, 8, 0.3, seed=-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_kills(runs, seed):
    """Of runs with a line for each step, and of some with blocks of three."""
    kill_at_random(runs, 60, 8, 0.3, seed)
    kill_at_random(runs, 40, 3000, 0.4, seed)
    # Blocks were in use, unless no attempt came to its first step.
    if runs.run.ledger.exists():
        assert {line.num_steps for line in read(runs.run.ledger).reservations} <= {3}
