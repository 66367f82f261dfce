"""The interval that accountants are judged by, what each claims, and the tables of both."""

import math
import os
import signal
from functools import partial

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from bench import accountants, bracket
from bench.accountants import ACCOUNTANTS, CALIBRATIONS, Refusal, Target
from bench.bracket import Setting
from bench.report import cost_tables
from dpengine.accounting import EPS_ERROR


def gaussian_delta(epsilon, setting):
    """All steps on all records: one Gaussian, μ² = T/σ² (arXiv 1905.02383, corollary 2.13)."""
    mu = math.sqrt(setting.num_steps) / setting.noise_multiplier
    left, right = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return norm.cdf(left) - math.exp(epsilon + norm.logcdf(right))


def one_step_delta(epsilon, setting):
    """One sampled step, removal of a record: the excess where densities differ by more than e^ε."""
    q, sigma = setting.sampling_rate, setting.noise_multiplier
    z = sigma * math.log((math.exp(epsilon) - 1 + q) / q) + 1 / (2 * sigma)
    return (1 - q - math.exp(epsilon)) * norm.sf(z) + q * norm.sf(z - 1 / sigma)


def exact(setting):
    """ε by whichever closed form there is."""
    delta = gaussian_delta if setting.sampling_rate == 1 else one_step_delta
    assert setting.sampling_rate == 1 or setting.num_steps == 1
    return brentq(lambda epsilon: delta(epsilon, setting) - setting.delta, 1e-9, 200, xtol=1e-13)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(10.0, 1.0, 100, 1e-5),
        Setting(0.6, 0.001, 1, 1e-6),
    ],
    ids=str,
)
def test_the_interval_holds_epsilon_and_is_narrow(setting):
    found, epsilon = bracket.bracket(setting), exact(setting)
    assert found.low <= epsilon <= found.high
    assert found.high - found.low <= 1e-4
    assert epsilon - found.low <= 1e-5


def test_the_lower_end_is_near_where_rounding_is_larger_than_delta():
    setting = Setting(20.0, 1.0, 100, 1e-40)
    low, epsilon = bracket.lower(setting), exact(setting)
    assert epsilon - 1e-5 <= low <= epsilon
    assert bracket.upper(setting) == math.inf


@pytest.mark.parametrize(
    "setting",
    # Most of the noise is at the least loss, ln(1 - q); the grid of a million steps is fine.
    [Setting(0.6, 0.001, 50, 1e-6), Setting(2.0, 1e-4, 1_000_000, 1e-6)],
    ids=str,
)
def test_the_interval_is_narrow_after_many_steps(setting):
    found = bracket.bracket(setting)
    assert 0 <= found.high - found.low <= 4e-4


def test_a_coin_keeps_all_mass_and_adds_no_divergence():
    random = np.random.default_rng(7)
    loss = np.arange(-20, 60) * 0.05
    without = random.dirichlet(np.ones(len(loss)))
    mass = without * np.exp(loss + random.uniform(-0.02, 0.02, len(loss)))
    nearer = bracket._nearer(mass, without, np.exp(loss))
    for before, after in zip((mass, without), nearer, strict=True):
        assert after.min() >= 0 and after.sum() == pytest.approx(before.sum(), rel=1e-12)
    for ratio in np.exp(np.arange(-1.5, 3.5, 0.01)):
        before, after = (np.maximum(p - ratio * q, 0).sum() for p, q in ((mass, without), nearer))
        assert after <= before + 1e-15
    off = [np.abs(np.log(p / q) - loss).mean() for p, q in ((mass, without), nearer)]
    assert off[1] < off[0] / 2


GAUSSIAN, ONE_STEP = Setting(3.0, 1.0, 9, 1e-5), Setting(2.0, 0.2, 1, 1e-5)

# How far above ε, in both settings: a claim is at most ε, its error and its interval's half width.
ERRORS = dict.fromkeys(ACCOUNTANTS, 2 * EPS_ERROR * exact(GAUSSIAN)) | {
    accountants.MICROSOFT: 0.2,
    accountants.MICROSOFT_FINE: 2 * EPS_ERROR * 5,
    accountants.OPACUS_PRV: 0.02,
    accountants.GOOGLE_PLD: 1e-3,
}
RDP = (accountants.OUR_RDP, accountants.OPACUS_RDP, accountants.GOOGLE_RDP)


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_an_accountant_is_asked_for_the_setting(name):
    for setting in (GAUSSIAN, ONE_STEP):
        epsilon = exact(setting)
        claimed = accountants.attempt(partial(ACCOUNTANTS[name], setting), 20)
        assert claimed >= epsilon
        # Rényi divergences are loose by a tenth, and at a single step far more.
        loose = epsilon / 10 if setting == GAUSSIAN else 2 * epsilon
        assert claimed <= epsilon + (loose if name in RDP else ERRORS[name])


def never():
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: math.nan, "no answer"),
        (lambda: math.inf, "infinite"),
        (lambda: [][0], "IndexError: list index out of range"),
        (never, "more than 0.05 s"),
    ],
)
def test_what_has_no_answer_is_a_refusal(call, reason):
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Refusal, match=reason):
        accountants.attempt(call, 0.05)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_reaches_its_target(name):
    target = Target(1.0, 1.0, 100, 1e-5)
    noise = accountants.attempt(partial(CALIBRATIONS[name], target), 20)
    assert 0.97 <= exact(Setting(noise, 1.0, 100, 1e-5)) <= 1


def test_our_calibration_is_searched_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, calibrate = [], accountants.calibrate_noise_multiplier

    def watched(*setting):
        folder = os.environ["XDG_CACHE_HOME"]
        before.append(os.listdir(folder))
        noise = calibrate(*setting)
        assert os.listdir(folder)
        return noise

    monkeypatch.setattr(accountants, "calibrate_noise_multiplier", watched)
    target = Target(1.0, 1.0, 10, 1e-5)
    first, second = (CALIBRATIONS[accountants.OURS](target) for _ in range(2))
    assert first == second and before == [[], []]
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path) and not os.listdir(tmp_path)


def made_up(claims, times, **refused):
    ratio = {"quartile_1": 0.0, "quartile_3": 9.0}
    return {
        "reference": {"low": 2.0, "high": None},
        "claims": claims,
        "bound": {name: claimed >= 2 for name, claimed in claims.items()},
        "refused": refused,
        "over_ours": {name: ratio | {"median": times[name]} for name in claims},
    }


def test_the_table_sums_up_the_settings():
    epsilon = [
        made_up({"a": 2.5, "b": 1.0}, {"a": 1.0, "b": 4.0}, c="no answer"),
        made_up({"a": 2.25, "b": 2.001}, {"a": 2.0, "b": 4.0}, c="too slow"),
        made_up({"a": 2.0}, {"a": 3.0}, b="no answer"),
    ]
    lines = cost_tables.accounting({"results": {"epsilon": epsilon}}).splitlines()
    assert lines[2:] == [
        "| a | 2.00 (1.00–3.00) | 0.5 | 25 % | 0 | 0 | 3 |",
        "| b | 4.00 (4.00–4.00) | 0.001 | 0.05 % | 1 | 1 | 3 |",
        "| c |  |  |  |  | 2 | 2 |",
    ]


def test_the_table_says_which_target_is_not_kept():
    names = ("dpengine", "Opacus")
    over = partial(dict, quartile_1=1.0, quartile_3=2.0, rounds=5)
    target = {
        "target": "ε = 1",
        "refused": {},
        "noise_multiplier": dict(zip(names, (1.5, 1.25), strict=True)),
        "spent": dict(zip(names, ({"high": 0.99}, {"high": 1.02}), strict=True)),
        "keeps": dict(zip(names, (True, False), strict=True)),
        "over_ours": dict(zip(names, (over(median=1.0), over(median=1.75)), strict=True)),
    }
    content = {"results": {"epsilon": [], "calibration": [target]}}
    expected = "| ε = 1 | 1.75 (1.00–2.00) | 1.5000 | 1.2500 | 0.9900 | 1.0200, too much |"
    assert cost_tables.accounting(content).splitlines()[-1] == expected
    target |= {"refused": {"Opacus": "too slow"}, "over_ours": {}}
    refused = "| ε = 1 |  | 1.5000 | refused | 0.9900 |  |"
    assert cost_tables.accounting(content).splitlines()[-1] == refused
