"""What does secure noise cost, beside `torch.randn`? pytest bench/test_noise.py --benchmark-only

For the adapter of the shipped base model and those of SD 1.5 and SDXL at rank 4. What share of a
step it takes stands in the suite `steps`. That the values are normal is checked before they are
timed; that a key is never used twice, and how far the normals reach, is tested elsewhere.
"""

import pytest

from . import noise
from .noise import OURS, RANDN
from .shapes import N_VALUES

COUNTS = {"digits": 5_888} | N_VALUES
"""Trainable parameters at rank 4."""


@pytest.mark.parametrize("model", COUNTS)
def test_noise(answer, benchmark, full, model):
    count = COUNTS[model]
    moments = {name: noise.check(source(count)) for name, source in noise.sources().items()}
    turns = noise.in_turns(count)
    benchmark.pedantic(turns.round, rounds=25 if full else 9)
    entry = {"model": model, "moments": moments} | noise.compared(count, turns)
    over, speed = entry["over_randn"], entry["gb_per_s"]
    answer(
        "noise",
        entry,
        f"{model}: {speed[OURS]:.2f} GB/s beside {speed[RANDN]:.2f} of torch.randn; "
        + ", ".join(f"{name} {r['median']:.1f}" for name, r in over.items() if name != RANDN)
        + " times its time",
    )
