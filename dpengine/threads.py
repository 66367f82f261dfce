"""How the threads of a command wait for each other."""

import os

_SPINS = "1000"
"""Rounds of OpenMP's waiting loop, about 10 microseconds, before a thread goes to sleep."""


def sleep_soon() -> None:
    """Let waiting OpenMP threads go to sleep soon; to be called before torch is loaded.

    A step of a small model is thousands of regions of microseconds. At the end of each, GNU
    OpenMP's threads turn in a loop for about 3 milliseconds before they sleep. On a machine with
    other work the thread that they wait for has lost its core to them or to that work, and a step
    takes many times as long; after a short turn it costs a quiet machine nothing that was measured
    (`bench/test_threads.py`). Commands call this, an import of the package never does. Whoever has
    chosen how threads wait, by OMP_WAIT_POLICY or GOMP_SPINCOUNT, keeps that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
