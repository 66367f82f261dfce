"""One training step of a UNet with LoRA: PEFT without privacy, dpengine, and Opacus' modes.

pytest bench/test_steps.py --benchmark-only [--full]

Around a centre one thing is changed at a time; ghost clipping and functorch run at the centre, and
elsewhere with ``--full``. A step is forward, backward, clipping, noise and an AdamW update on one
batch that is there already: sampling, data loading and accounting are not in it. Before anything is
timed, each private peer's clipped sum without noise is compared with a float64 loop over single
records; whoever refuses or is wrong is recorded so and not timed.

The UNet is small, so what a peer does for each tensor weighs more than on a large one. Compiling
takes minutes on a CPU: there compiled peers run with ``--full`` only, and at the centre only.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest

from dpengine.accounting import compute_epsilon

from . import steps, sums
from .peers import (
    AS_RECORDS,
    COMPILED,
    DRAWS_PEERS,
    EW,
    HOOKS,
    MAX_GRAD_NORM,
    NON_PRIVATE,
    OURS,
    PEERS,
    RECORDED,
    Start,
)
from .steps import CONVOLUTIONS, Case
from .training import TARGETS
from .turns import DEVICE

CENTRE = Case()
CASES = {
    "centre": CENTRE,
    "batch 4": Case(batch=4),
    "rank 16": Case(rank=16),
    "8 pixels": Case(size=8),
    "half of the adapters": Case(targets=TARGETS[::2]),
    "with convolutions": Case(targets=TARGETS + CONVOLUTIONS),
}
FULL_CASES = {
    "batch 64": Case(batch=64),
    "rank 64": Case(rank=64),
    "32 pixels": Case(size=32),
}
MEMORY_CASES = (CENTRE, Case(size=8, rank=64))
"""The centre, and one where gradients outweigh activations."""
ALL = tuple(PEERS)
FEW = (NON_PRIVATE, OURS, HOOKS, EW)
DRAWS, FULL_DRAWS = (4,), (2, 4, 8)
PLAN = {"sampling_rate": 0.01, "noise_multiplier": 1.0, "num_steps": 1000, "delta": 1e-5}
"""An example of training, for what the draws of a record cost in privacy."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        more = FULL_CASES if metafunc.config.getoption("--full") else {}
        metafunc.parametrize("name", CASES | more)
    if "draws" in metafunc.fixturenames:
        metafunc.parametrize("draws", FULL_DRAWS if metafunc.config.getoption("--full") else DRAWS)


def test_step(answer, benchmark, full, name):
    """How long is a step beside a non-private one and beside Opacus', and of how much work?"""
    case = (CASES | FULL_CASES)[name]
    names = ALL if full or case == CENTRE else FEW
    sound, verdicts = _examined(case, full, names)
    turns = steps.steps_in_turns(case, sound)
    benchmark.pedantic(turns.round, rounds=25 if full else 5)
    entry = _about(name, case) | {"verdicts": verdicts} | steps.compared(case, turns)
    entry |= steps.counted(case, sound)
    answer("step", entry, f"{name}: {_ratios(entry['over_non_private'])} of non-private")


def test_phases(answer, benchmark, full):
    """Where does the time go? In units of the whole non-private step."""
    whole, _ = _examined(CENTRE, full, ALL)
    about = (CENTRE.task, whole, CENTRE.batch, CENTRE.draws)
    sound, verdicts = sums.examine(*about, in_phases=True)
    assert set(sound) == set(whole), verdicts
    turns, phased = steps.phases_in_turns(CENTRE, sound)
    benchmark.pedantic(turns.round, rounds=25 if full else 5)
    entry = _about("centre", CENTRE) | {"peers": steps.phase_entry(turns, phased)}
    for name, of in entry["peers"].items():
        # Phases that left work out, or did some twice, are off by a pass of the model: a third.
        assert 0.75 < of["sum_over_whole"]["of_fastest"] < 1.33, (name, of["sum_over_whole"])
        parts = of["over_non_private_step"].items()
        line = ", ".join(f"{phase} {r['median']:.3f}" for phase, r in parts)
        answer("phases", {"peer": name} | _about("centre", CENTRE) | of, f"{name}: {line}")


def test_memory(answer, benchmark, full):
    """How much memory does a step need above a non-private one?"""

    def measure() -> list[tuple[Case, dict[str, Any]]]:
        cases = [*MEMORY_CASES, *((CASES | FULL_CASES).values() if full else ())]
        return [
            (case, steps.peaks(case, _examined(case, full, ALL)[0]))
            for case in dict.fromkeys(cases)
        ]

    for case, entry in benchmark.pedantic(measure, rounds=1):
        about = _about(_name(case), case)
        above = {peer: f"{n:.2f}" for peer, n in entry["above_non_private"].items()}
        answer("memory", about | entry, f"{about['case']}: {above} · 4·N·P above non-private")


def test_largest_batch(answer, benchmark, full):
    """How many records fit a memory limit?"""
    max_bytes = 2**34 if DEVICE == "cuda" else 2**29 if full else 2**26
    sound, _ = _examined(CENTRE, full, ALL)
    # What is recorded takes one size of batch.
    peers = {name: sound[name] for name in sound if name not in RECORDED}

    def measure() -> dict[str, dict[str, Any]]:
        return {name: steps.largest_batch(CENTRE, sound[name], max_bytes) for name in peers}

    found = benchmark.pedantic(measure, rounds=1)
    assert all(of["bytes"] <= max_bytes < of["bytes_of_one_more"] for of in found.values())
    records = {name: of["records"] for name, of in found.items()}
    entry = _about("centre", CENTRE) | {"max_bytes": max_bytes, "peers": found}
    answer("largest_batch", entry, f"{max_bytes:,} bytes: {records}")


def test_draws(answer, benchmark, full, draws):
    """What do several draws of an image cost, beside what a user of Opacus must do by hand?

    Draws as records are no peer in what is computed: the sum is another one, and a record moves it
    by up to K·C. At equal noise the epsilon is that of a K-th of the noise multiplier; for equal
    epsilon the noise must be K times as large, for a sum that is at most K times as long.
    """
    case = Case(draws=draws, batch=16 if full else 4)
    averaged = {name: peer for name, peer in DRAWS_PEERS.items() if name != AS_RECORDS}
    sound, verdicts = sums.examine(case.task, averaged, case.batch, draws)
    # Each draw is clipped by itself: the sum over N·K records of one draw.
    alone = {AS_RECORDS: DRAWS_PEERS[AS_RECORDS]}
    clipped_apart, verdict = sums.examine(case.task, alone, case.rows)
    assert AS_RECORDS in clipped_apart, verdict
    sound |= alone
    verdicts |= verdict
    moved = {
        name: sums.contributions(case.task, peer, case.batch, draws)
        for name, peer in sound.items()
        if name != NON_PRIVATE
    }
    for name, by in moved.items():
        bound = draws if name == AS_RECORDS else 1
        # The others' rounding differs with and without the record.
        assert max(by.values()) <= bound + 1e-3, (name, by)
    assert moved[AS_RECORDS]["aligned"] > draws - 1e-3
    turns = steps.steps_in_turns(case, sound)
    benchmark.pedantic(turns.round, rounds=25 if full else 5)
    entry = _about(f"{draws} draws", case) | {"verdicts": verdicts} | steps.compared(case, turns)
    entry |= {"moved_by_one_record_in_C": moved, "privacy": _privacy(draws)}
    entry["memory"] = steps.peaks(case, sound)
    answer("draws", entry, f"K = {draws}: {_ratios(entry['over_ours'])} of ours")
    epsilon = entry["privacy"]
    answer(
        "draws_privacy",
        epsilon | {"moved_by_one_record_in_C": moved},
        f"a record moves {AS_RECORDS} by {moved[AS_RECORDS]['aligned']:.2f} C: epsilon "
        f"{epsilon['epsilon']:.2f} is {epsilon['epsilon_of_draws_as_records']:.0f}",
    )


def _privacy(draws: int) -> dict[str, Any]:
    worse = PLAN | {"noise_multiplier": PLAN["noise_multiplier"] / draws}
    return {
        "plan": PLAN,
        "draws": draws,
        "epsilon": compute_epsilon(**PLAN).upper,
        "epsilon_of_draws_as_records": compute_epsilon(**worse).upper,
        "noise_multiplier_of_draws_as_records_for_equal_epsilon": draws * PLAN["noise_multiplier"],
    }


@cache
def _examined(
    case: Case, full: bool, names: tuple[str, ...]
) -> tuple[dict[str, Start], sums.Verdicts]:
    """Who of ``names`` is sound; each case is examined once."""
    left_out = {}
    if DEVICE == "cpu" and not (full and case == CENTRE):
        reason = {"not_run": "compiling takes minutes on a CPU: --full, centre only"}
        left_out = {name: reason for name in COMPILED if name in names}
    peers = {name: PEERS[name] for name in names if name not in left_out}
    sound, verdicts = sums.examine(case.task, peers, case.batch, case.draws)
    return sound, verdicts | left_out


def _about(name: str, case: Case) -> dict[str, Any]:
    return {"case": name, "max_grad_norm": MAX_GRAD_NORM, **asdict(case)}


def _name(case: Case) -> str:
    named = {case: name for name, case in (CASES | FULL_CASES).items()}
    return named.get(case, f"{case.size} pixels, rank {case.rank}")


def _ratios(ratios: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {r['median']:.2f}" for name, r in ratios.items())
