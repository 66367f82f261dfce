"""How fast and how tight is each accountant, is its answer a bound, and which σ does a target get?

Of each setting the accountants take turns; what they claim is compared with an interval that holds
ε (bracket.py). A claim below it is none, and a peer that fails or takes too long is kept with the
reason. By default the settings that no accountant is slow for; with `--full` more, some of which
peers are known to fail at, and two more accountants.
"""

import math
from dataclasses import asdict
from functools import partial

import pytest

from dpengine.accounting import EPS_ERROR

from . import accountants
from .accountants import ACCOUNTANTS, CALIBRATIONS, OURS, SLOWEST, Refusal, Target
from .bracket import Setting, bracket
from .turns import Turns

SETTINGS = [
    Setting(1.0, 0.01, 1000, 1e-5),
    Setting(1.1, 256 / 60000, 14062, 1e-5),
    Setting(2.0, 0.1, 1000, 1e-5),
    Setting(3.0, 0.1, 512, 1e-6),
    Setting(10.0, 1.0, 100, 1e-5),
    Setting(1.0, 0.01, 1, 1e-5),
    Setting(1.0, 0.01, 1000, 1e-10),
]

MORE = [
    Setting(0.8, 0.005, 1000, 1e-6),
    Setting(1.0, 0.01, 10_000, 1e-6),
    Setting(0.7, 0.02, 2000, 1e-5),
    Setting(0.5, 0.01, 1000, 1e-5),
    Setting(4.0, 0.5, 500, 1e-5),
    Setting(0.6, 0.001, 5000, 1e-6),
    Setting(1.5, 0.25, 200, 1e-6),
    Setting(2.0, 1e-4, 1_000_000, 1e-6),
    # Peers failed, or took more than ten seconds: large ε, small δ.
    Setting(0.5, 0.2, 100, 1e-5),
    Setting(0.4, 0.0256, 5000, 1e-5),
    Setting(1.0, 0.01, 1000, 1e-15),
]

TARGETS = [Target(1.0, 0.01, 1000, 1e-5), Target(3.0, 0.1, 200, 1e-5)]

MORE_TARGETS = [
    Target(8.0, 0.05, 100, 1e-5),
    Target(3.0, 256 / 60000, 14062, 1e-5),
    Target(50.0, 0.1, 1000, 1e-5),
]

TIGHT = 2 * EPS_ERROR
"""How far our bound may be above ε, relative above 1: its interval is twice as wide as its error
and holds ε. What it charges to δ besides, at most a hundredth, is far less at these settings."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "setting" in metafunc.fixturenames:
        metafunc.parametrize("setting", SETTINGS + full * MORE, ids=str)
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", TARGETS + full * MORE_TARGETS, ids=str)


@pytest.fixture(scope="module", autouse=True)
def everything_imported() -> None:
    """The first call of a library imports and compiles."""
    for name in ACCOUNTANTS:
        accountants.attempt(partial(ACCOUNTANTS[name], Setting(10.0, 1.0, 1, 1e-5)), 60)


def test_epsilon(benchmark, answer, full, setting):
    truth = bracket(setting)
    assert truth.low <= truth.high
    peers = {name: call for name, call in ACCOUNTANTS.items() if full or name not in SLOWEST}
    claims, refused, turns = _asked(benchmark, peers, setting, 3, 60 if full else 10)

    by = accountants.ours(setting).accountant
    assert claims[OURS] >= truth.low
    if by != "rdp" and math.isfinite(truth.high):
        assert claims[OURS] <= truth.high + TIGHT * max(1.0, truth.high)
    entry = {
        "setting": str(setting),
        **asdict(setting),
        "reference": {"low": truth.low, "high": truth.high if truth.high < math.inf else None},
        "answered_by": by,
        "claims": claims,
        "bound": {name: claimed >= truth.low for name, claimed in claims.items()},
        "refused": refused,
        "over_ours": {name: turns.ratio(name, OURS) for name in claims},
        "median_ms": {name: turns.median_ms()[name] for name in claims},
    }
    answer("epsilon", entry, _line(entry))


def test_calibration(benchmark, answer, full, target):
    found, refused, turns = _asked(benchmark, CALIBRATIONS, target, 3 if full else 2, 120)
    spent = {
        name: bracket(Setting(sigma, target.sampling_rate, target.num_steps, target.delta))
        for name, sigma in found.items()
    }
    assert spent[OURS].low <= target.epsilon
    entry = {
        "target": str(target),
        **asdict(target),
        "noise_multiplier": found,
        "spent": {name: asdict(interval) for name, interval in spent.items()},
        "keeps": {name: interval.low <= target.epsilon for name, interval in spent.items()},
        "refused": refused,
        "over_ours": {name: turns.ratio(name, OURS) for name in found},
        "median_ms": {name: turns.median_ms()[name] for name in found},
    }
    parts = [
        f"{name} σ = {sigma:.4f} spends {spent[name].low:.4f} to {spent[name].high:.4f}"
        f" x {entry['over_ours'][name]['median']:.2f}"
        for name, sigma in found.items()
    ]
    parts += [f"{name}: {reason}" for name, reason in refused.items()]
    answer("calibration", entry, f"{target}: {', '.join(parts)}")


def _asked(benchmark, peers, question, rounds: int, seconds: float):
    """The answers of those that always have one, the reasons of the others, and their turns."""
    answers, refused = {}, {}

    def ask(name: str) -> None:
        if name not in refused:
            try:
                answers[name] = accountants.attempt(partial(peers[name], question), seconds)
            except Refusal as refusal:
                refused[name] = str(refusal)

    turns = Turns({name: partial(ask, name) for name in peers})
    benchmark.pedantic(turns.round, rounds=rounds)
    answers = {name: found for name, found in answers.items() if name not in refused}
    return answers, refused, turns


def _line(entry: dict) -> str:
    low, high = entry["reference"]["low"], entry["reference"]["high"]
    parts = [
        f"{name} {claimed - low:+.4f}{'' if entry['bound'][name] else ' NO BOUND'}"
        f" x {entry['over_ours'][name]['median']:.2f}"
        for name, claimed in entry["claims"].items()
    ]
    parts += [f"{name}: {reason}" for name, reason in entry["refused"].items()]
    interval = f"{low:.5f} to {'∞' if high is None else f'{high:.5f}'}"
    return f"{entry['setting']}: ε {interval}, by {entry['answered_by']}; {', '.join(parts)}"
