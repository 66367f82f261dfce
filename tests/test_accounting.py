"""The accountant against a second library, closed forms and the geometry of the noise."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from dpengine import accounting
from dpengine.accounting import (
    EPS_ERROR,
    AccountingError,
    Charge,
    Epsilon,
    calibrate_noise_multiplier,
    compute_epsilon,
    noise_tail_delta,
    spent,
    spent_together,
)
from dpengine.secure_random import MAX_GAUSSIAN


def row(sigma, q, num_steps, delta, epsilon, *, slow=False):
    marks = [pytest.mark.slow] if slow else []
    name = f"sigma={sigma:g},q={q:.3g},T={num_steps},delta={delta:g}"
    return pytest.param(sigma, q, num_steps, delta, epsilon, marks=marks, id=name)


# ε by dp_accounting's pessimistic PLD on a grid of 2e-5 (2e-6 for a million steps).
PLD_UPPER = [
    row(1.0, 0.01, 1000, 1e-5, 1.82824),
    row(1.1, 256 / 60000, 14062, 1e-5, 2.38160, slow=True),
    row(0.8, 0.005, 1000, 1e-6, 2.00411),
    row(1.0, 0.01, 10**4, 1e-6, 6.90739, slow=True),
    row(0.7, 0.02, 2000, 1e-5, 12.88296, slow=True),
    row(0.5, 0.01, 1000, 1e-5, 13.36082, slow=True),
    row(2.0, 0.1, 1000, 1e-5, 8.27929, slow=True),
    row(3.0, 0.1, 512, 1e-6, 3.76968),
    row(4.0, 0.5, 500, 1e-5, 15.51840, slow=True),
    row(0.6, 0.001, 5000, 1e-6, 2.74841, slow=True),
    row(1.5, 0.25, 200, 1e-6, 15.94156, slow=True),
    row(10.0, 1.0, 100, 1e-5, 4.37718),
    row(1.0, 0.01, 1, 1e-5, 0.19945),
    row(1.0, 0.01, 1000, 1e-10, 3.29042, slow=True),
    row(2.0, 1e-4, 10**6, 1e-6, 0.20315, slow=True),
]


@pytest.mark.parametrize(("sigma", "q", "num_steps", "delta", "epsilon"), PLD_UPPER)
def test_bounds_enclose_the_reference_table(sigma, q, num_steps, delta, epsilon):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.lower - 1e-3 <= epsilon <= bounds.upper + 1e-3
    # The estimate is ours to EPS_ERROR, and the error of delta adds a little on each side.
    assert 0 <= bounds.lower <= bounds.estimate <= bounds.upper
    assert bounds.upper - bounds.lower <= 2 * EPS_ERROR + max(1e-3, 1e-3 * epsilon)


def pld(sigma, q, num_steps, delta, *, pessimistic, grid=1e-4):
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    loss = from_gaussian_mechanism(
        sigma,
        pessimistic_estimate=pessimistic,
        value_discretization_interval=grid,
        sampling_prob=q,
        use_connect_dots=pessimistic,
        neighboring_relation=relation if pessimistic else relation.ADD_OR_REMOVE_ONE,
    )
    return loss.self_compose(num_steps).get_epsilon_for_delta(delta)


def assert_brackets_overlap(q, sigma, num_steps, delta, grid=1e-4):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    setting = (sigma, q, num_steps, delta)
    assert bounds.upper >= pld(*setting, pessimistic=False, grid=grid)
    assert bounds.lower <= pld(*setting, pessimistic=True, grid=grid)


@pytest.mark.parametrize(
    ("q", "sigma", "num_steps", "delta"),
    [(0.05, 0.8, 50, 1e-5), (0.3, 2.0, 30, 1e-6), (0.001, 1.2, 300, 1e-5), (0.9, 5.0, 40, 1e-4)],
)
def test_bounds_overlap_with_those_of_a_second_library(q, sigma, num_steps, delta):
    """Zero-out adjacency from above, add-remove from below: ε is the same for both."""
    assert_brackets_overlap(q, sigma, num_steps, delta)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(
    q=st.floats(1e-3, 0.999),
    sigma=st.floats(0.7, 10),
    num_steps=st.integers(1, 300),
    delta=st.sampled_from([1e-4, 1e-5, 1e-6, 1e-8]),
)
def test_bounds_overlap_with_those_of_a_second_library_everywhere(q, sigma, num_steps, delta):
    try:
        assert_brackets_overlap(q, sigma, num_steps, delta, grid=2e-5)
    except AccountingError:
        # Refusing is allowed where the privacy is poor, and a wrong number nowhere.
        assert pld(sigma, q, num_steps, delta, pessimistic=True) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "q", "num_steps", "delta", "epsilon"), PLD_UPPER)
def test_bounds_overlap_with_a_fine_grid(sigma, q, num_steps, delta, epsilon):
    grid = 2e-6 if num_steps == 10**6 else 2e-5
    assert pld(sigma, q, num_steps, delta, pessimistic=True, grid=grid) == pytest.approx(
        epsilon, abs=1e-4
    )
    assert_brackets_overlap(q, sigma, num_steps, delta, grid)


def gaussian_dp_epsilon(mu, delta):
    """ε of μ-Gaussian DP (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def excess(eps):
        log_second = eps + norm.logcdf(-eps / mu - mu / 2)
        return norm.cdf(-eps / mu + mu / 2) - math.exp(log_second) - delta

    return brentq(excess, 0, 10 * mu * (mu + 10), xtol=1e-12)


@pytest.mark.parametrize("delta", [1e-4, 1e-8], ids="delta={:g}".format)
@pytest.mark.parametrize("num_steps", [1, 7, 400], ids="T={}".format)
@pytest.mark.parametrize("sigma", [0.8, 3.0, 40.0], ids="sigma={}".format)
def test_rate_one_is_gaussian_dp_with_the_root_of_the_steps(sigma, num_steps, delta):
    exact = gaussian_dp_epsilon(math.sqrt(num_steps) / sigma, delta)
    bounds = compute_epsilon(1.0, sigma, num_steps, delta)
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.estimate == pytest.approx(exact, abs=EPS_ERROR)


BASE = {"sampling_rate": 0.1, "noise_multiplier": 2.0, "num_steps": 10, "delta": 1e-5}


@pytest.mark.parametrize(
    ("name", "worse"),
    [("sampling_rate", 0.12), ("noise_multiplier", 1.8), ("num_steps", 14), ("delta", 1e-6)],
)
def test_each_number_moves_epsilon_in_its_direction(name, worse):
    assert compute_epsilon(**BASE).upper < compute_epsilon(**BASE | {name: worse}).lower


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.1),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.inf),
        ("noise_multiplier", math.nan),
        ("num_steps", 0),
        ("num_steps", 1.5),
        ("delta", 0.0),
        ("delta", math.nan),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        compute_epsilon(**BASE | {name: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "num_steps", "delta"),
    [
        (1.0, 1000, 1e-15),
        (0.3, 1000, 1e-5),
        (1.0, 1000, 1e-18),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_certified_says_what_to_change(sigma, num_steps, delta):
    with pytest.raises(AccountingError, match=r"cannot be certified .* choose .* larger delta"):
        compute_epsilon(0.01, sigma, num_steps, delta)


class Broken:
    """An accountant that fails, or answers with what is no bound."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, **_):
        return self

    def compute_epsilon(self, delta, num_self_compositions):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("Discrete mean differs significantly from continuous mean."),
        ValueError("Cannot compute epsilon for given delta"),
        OverflowError(),
        FloatingPointError(),
        MemoryError(),
        (math.nan, math.nan, math.nan),
        (1.0, math.nan, 2.0),
        (1.0, 2.0, math.inf),
        (2.0, 1.0, 3.0),
        (1.0, 3.0, 2.0),
    ],
    ids=repr,
)
def test_what_is_no_certificate_is_never_returned(answer, monkeypatch):
    monkeypatch.setattr(accounting, "PRVAccountant", Broken(answer))
    with pytest.raises(AccountingError, match="cannot be certified"):
        compute_epsilon(**BASE)


def test_a_lower_bound_below_zero_is_zero(monkeypatch):
    monkeypatch.setattr(accounting, "PRVAccountant", Broken((-0.5, 0.1, 0.7)))
    assert compute_epsilon(**BASE) == Epsilon(0.0, 0.1, 0.7)


def leaving(shift):
    """Probability that a draw from the disc of radius R around ``shift`` is outside its own.

    In polar coordinates around the shifted centre: the draw leaves beyond the radius where its
    ray meets the other rim, ``(1/2π) ∫ (exp(-r(θ)²/2) - exp(-R²/2))₊ dθ``.
    """
    angle = (np.arange(20_000) + 0.5) * np.pi / 20_000
    rim = -shift * np.cos(angle) + np.sqrt(
        np.maximum(MAX_GAUSSIAN**2 - (shift * np.sin(angle)) ** 2, 0)
    )
    rim = np.clip(rim, 0, MAX_GAUSSIAN)
    gain = np.expm1((MAX_GAUSSIAN**2 - rim**2) / 2)
    return float(math.exp(-(MAX_GAUSSIAN**2) / 2) * gain.mean())


def test_leaving_agrees_with_its_first_order():
    density = MAX_GAUSSIAN * math.exp(-(MAX_GAUSSIAN**2) / 2)
    assert leaving(1e-6) == pytest.approx(1e-6 * density / math.pi, rel=1e-4)


@pytest.mark.parametrize("parameters", [1, 2, 100, 10**4, 10**6, 10**8], ids="P={}".format)
@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.0, 10.0, 100.0], ids="sigma={}".format)
def test_the_tail_charge_covers_a_contribution_spread_over_any_number_of_pairs(sigma, parameters):
    charge = noise_tail_delta(0.2, sigma, 30, parameters) / (0.2 * 30)
    n_pairs = 1
    while n_pairs <= max(1, parameters // 2):
        shift = 1 / (sigma * math.sqrt(n_pairs))
        assert n_pairs * leaving(shift) <= charge, f"{n_pairs} pairs"
        n_pairs *= 2


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.0], ids="sigma={}".format)
def test_the_tail_charge_is_at_most_twice_what_one_pair_loses(sigma):
    one_pair = leaving(1 / sigma)
    assert one_pair <= noise_tail_delta(1.0, sigma, 1, 2) <= 2 * one_pair


def test_the_tail_charge_is_linear_in_steps_and_rate():
    once = noise_tail_delta(1.0, 1.0, 1, 100)
    assert noise_tail_delta(0.25, 1.0, 1000, 100) == pytest.approx(250 * once)


def replace_accountant(monkeypatch, epsilon):
    """``epsilon(q, sigma, num_steps, delta)`` in the place of the accountant's."""

    def composed(charges, delta, eps_error):
        (charge,) = charges
        return epsilon(*charge[:3], delta)

    monkeypatch.setattr(accounting, "_composed", composed)


def test_spent_leaves_the_tail_out_of_what_the_accountant_gets(monkeypatch):
    seen = []

    def recorded(q, sigma, num_steps, delta):
        seen.append((q, sigma, num_steps, delta))
        return Epsilon(1.0, 2.0, 3.0)

    replace_accountant(monkeypatch, recorded)
    monkeypatch.setattr(accounting, "noise_tail_delta", lambda *_: 2e-9)
    assert spent(0.1, 2.0, 10, 1e-5, 100) == (1.0, 2.0, 3.0)
    assert seen == [(0.1, 2.0, 10, 1e-5 - 2e-9)]


def test_charges_together_are_what_another_accountant_composes():
    """Two rates and noises, and full passes, against PLD at a fine grid."""
    charges = [
        Charge(0.02, 1.1, 300, 100),
        Charge(0.1, 2.0, 40, 100),
        Charge(1.0, 8.0, 2, 100),
        Charge(1.0, 6.0, 1, 100),
    ]
    pld = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
    for charge in charges:
        event = dp_accounting.GaussianDpEvent(charge.noise_multiplier)
        if charge.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(charge.sampling_rate, event)
        pld.compose(event, charge.num_steps)
    bounds = spent_together(charges, 1e-5)
    assert bounds.lower <= pld.get_epsilon(1e-5) <= bounds.upper + 1e-3


def test_the_tails_of_all_charges_come_off_delta(monkeypatch):
    seen = []
    monkeypatch.setattr(accounting, "noise_tail_delta", lambda q, *_: 1e-9 * q)
    monkeypatch.setattr(
        accounting, "_composed", lambda charges, delta, _: seen.append((charges, delta))
    )
    charges = [Charge(0.5, 1.0, 3, 10), Charge(0.25, 1.0, 0, 10), Charge(0.125, 1.0, 1, 10)]
    spent_together(charges, 1e-5)
    assert seen == [([charges[0], charges[2]], 1e-5 - 0.625e-9)]


def test_a_charge_without_noise_is_no_privacy_and_none_at_all_is_no_cost():
    assert (
        spent_together([Charge(0.1, 1.0, 5, 10), Charge(0.1, 0.0, 1, 10)], 1e-5).upper == math.inf
    )
    assert spent_together([], 1e-5).upper == 0
    assert spent_together([Charge(0.1, 0.0, 0, 10)], 1e-5).upper == 0


@pytest.mark.parametrize(("share", "refused"), [(1.01, True), (0.99, False)])
def test_a_tail_above_a_thousandth_of_delta_is_refused(share, refused, monkeypatch):
    replace_accountant(monkeypatch, lambda *_: Epsilon(1.0, 2.0, 3.0))
    monkeypatch.setattr(accounting, "noise_tail_delta", lambda *_: share * 1e-8)
    if refused:
        with pytest.raises(AccountingError, match="tail"):
            spent(0.1, 2.0, 10, 1e-5, 100)
    else:
        assert spent(0.1, 2.0, 10, 1e-5, 100).upper == 3.0


@pytest.mark.parametrize("sigma", [0.35, 0.1, 0.01, 1e-6, 1e-100, 1e-200], ids="{:g}".format)
def test_little_noise_is_refused_for_its_tail(sigma):
    with pytest.raises(AccountingError, match="tail"):
        spent(1.0, sigma, 10**4, 1e-5, 1000)


def test_no_steps_spend_nothing_and_no_noise_spends_everything():
    assert spent(0.1, 2.0, 0, 1e-5, 100) == (0, 0, 0)
    assert spent(0.1, 0.0, 1, 1e-5, 100) == (math.inf,) * 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


CALIBRATIONS = [
    # epsilon, delta, q, T, P
    (8.0, 1e-4, 1.0, 60, 10**4),
    (1.0, 1e-5, 1.0, 1, 10),
    (0.05, 1e-6, 1.0, 10, 10**6),
    pytest.param(1.5, 1e-5, 0.25, 2, 10**4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("epsilon", "delta", "q", "num_steps", "parameters"), CALIBRATIONS)
def test_the_noise_is_certified_and_not_one_per_cent_too_much(
    cache, epsilon, delta, q, num_steps, parameters
):
    sigma = calibrate_noise_multiplier(epsilon, delta, q, num_steps, parameters)
    assert spent(q, sigma, num_steps, delta, parameters).upper <= epsilon
    weaker = spent(q, 0.99 * sigma, num_steps, delta, parameters)
    assert weaker.upper > epsilon - EPS_ERROR
    assert json.loads(json.dumps(sigma)) == sigma
    # The second library agrees that the target holds, with less than 2 % of it to spare.
    if q == 1:
        exact = gaussian_dp_epsilon(math.sqrt(num_steps) / sigma, delta)
    else:
        exact = pld(sigma, q, num_steps, delta, pessimistic=True)
    assert epsilon - 2 * EPS_ERROR - 0.02 * epsilon <= exact <= epsilon


def test_no_target_needs_no_noise(cache):
    assert calibrate_noise_multiplier(math.inf, 1e-5, 0.1, 10, 100) == 0


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, 1e-9, 2 * EPS_ERROR], ids=str)
def test_a_target_that_the_accountant_cannot_resolve_is_refused(cache, epsilon):
    with pytest.raises(ValueError, match="target_epsilon"):
        calibrate_noise_multiplier(epsilon, 1e-5, 0.1, 10, 100)


@pytest.mark.slow
def test_a_target_that_needs_too_little_noise_is_refused_with_a_sentence(cache):
    # ε = 10,000 needs σ near 0.007, where the tail of the noise is longer than delta.
    with pytest.raises(AccountingError, match="choose an epsilon"):
        calibrate_noise_multiplier(1e4, 1e-5, 1.0, 1, 100)


def test_a_target_without_a_certified_noise_is_refused_with_a_sentence(cache, monkeypatch):
    monkeypatch.setattr(accounting, "noise_tail_delta", lambda *_: 1.0)
    with pytest.raises(AccountingError, match="choose an epsilon"):
        calibrate_noise_multiplier(*SETTING)


SETTING = (1.0, 1e-4, 1.0, 4, 10**4)


@pytest.fixture
def evaluations(monkeypatch):
    """What a quick stand-in for the accountant was asked."""
    calls = []

    def stand_in(q, sigma, num_steps, delta):
        calls.append((q, sigma, num_steps, delta))
        estimate = q * math.sqrt(-2 * num_steps * math.log(delta)) / sigma
        return Epsilon(estimate - EPS_ERROR, estimate, estimate + EPS_ERROR)

    replace_accountant(monkeypatch, stand_in)
    return calls


def test_a_cached_calibration_is_certified_again_but_not_searched_again(cache, evaluations):
    sigma = calibrate_noise_multiplier(*SETTING)
    assert len(evaluations) > 2
    evaluations.clear()
    assert calibrate_noise_multiplier(*SETTING) == sigma
    assert len(evaluations) == 1


@pytest.mark.parametrize("index", range(5))
def test_another_setting_does_not_use_the_cache(cache, evaluations, index):
    calibrate_noise_multiplier(*SETTING)
    evaluations.clear()
    other = [0.9, 0.9e-4, 0.5, 3, 10**4 + 1]
    calibrate_noise_multiplier(*SETTING[:index], other[index], *SETTING[index + 1 :])
    assert len(evaluations) > 1


POISON = ["", "nonsense", "null", "[3.0]", "true", "NaN", "Infinity", "-3.0", "0.0", "1", "1e999"]
WEAK = ["6.0", "0.5", "0.01", "1e-6", "1e-100", "1e-200"]


@pytest.mark.parametrize("content", POISON + WEAK)
def test_a_poisoned_cache_cannot_weaken_the_noise(cache, evaluations, content):
    sigma = calibrate_noise_multiplier(*SETTING)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    file.write_text(content)
    assert calibrate_noise_multiplier(*SETTING) == sigma


def test_a_cache_that_cannot_be_written_changes_nothing(cache, evaluations, monkeypatch):
    sigma = calibrate_noise_multiplier(*SETTING)
    file = cache / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert calibrate_noise_multiplier(*SETTING) == sigma


@pytest.mark.parametrize("eps_error", [0.002, 0.05])
def test_a_mechanism_that_costs_nothing_has_epsilon_zero(eps_error):
    """δ alone covers a record that is hardly ever drawn; rounding may put the estimate below 0."""
    bounds = accounting.compute_epsilon(1e-4, 10.0, 2, 1e-6, eps_error=eps_error)
    assert 0 == bounds.lower <= bounds.estimate <= bounds.upper <= eps_error
