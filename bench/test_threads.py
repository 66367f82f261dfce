"""What does a busy machine cost a training step, and what does the way its threads wait?

Each way of waiting takes turns with the others on a quiet machine, beside a loop that keeps one
core busy, and beside another job of two threads. Run it where nothing else runs.
"""

import pytest

from . import threads
from .threads import BY_ITSELF, DRAWS, LOADS, OURS, RECORDS, WAYS


@pytest.mark.parametrize("load", LOADS)
def test_threads(answer, benchmark, full, load):
    num_steps = 6
    rounds = 9 if full else 5
    turns = benchmark.pedantic(threads.measure, args=(load, num_steps, rounds), rounds=1)
    draws = num_steps * RECORDS * DRAWS
    entry = {
        "load": load,
        "over_ours": {way: turns.ratio(way, OURS) for way in WAYS},
        "draws_per_second": {way: 1e3 * draws / ms for way, ms in turns.median_ms().items()},
    }
    speed, spread = entry["draws_per_second"], entry["over_ours"][BY_ITSELF]
    line = ", ".join(f"{way} {speed[way]:.0f}" for way in WAYS)
    answer(
        "threads", entry, f"{load}: draws/s {line}; {BY_ITSELF} {spread['median']:.2f} of our time"
    )
