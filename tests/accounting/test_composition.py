"""What charges cost, against a table, a second library and closed forms."""

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
    composition,
    compute_epsilon,
    library,
    plan_epsilon,
    pld,
    prv,
    second_opinion,
    spent,
    spent_together,
)
from dpengine.plan import PrivacyPlan


def row(sigma, q, num_steps, delta, epsilon):
    name = f"sigma={sigma:g},q={q:.3g},T={num_steps},delta={delta:g}"
    return pytest.param(sigma, q, num_steps, delta, epsilon, id=name)


# ε by dp_accounting's pessimistic PLD on a grid of 2e-5 (2e-6 for a million steps).
PLD_UPPER = [
    row(1.0, 0.01, 1000, 1e-5, 1.82824),
    row(1.1, 256 / 60000, 14062, 1e-5, 2.38160),
    row(0.8, 0.005, 1000, 1e-6, 2.00411),
    row(1.0, 0.01, 10**4, 1e-6, 6.90739),
    row(0.7, 0.02, 2000, 1e-5, 12.88296),
    row(0.5, 0.01, 1000, 1e-5, 13.36082),
    row(2.0, 0.1, 1000, 1e-5, 8.27929),
    row(3.0, 0.1, 512, 1e-6, 3.76968),
    row(4.0, 0.5, 500, 1e-5, 15.51840),
    row(0.6, 0.001, 5000, 1e-6, 2.74841),
    row(1.5, 0.25, 200, 1e-6, 15.94156),
    row(10.0, 1.0, 100, 1e-5, 4.37718),
    row(1.0, 0.01, 1, 1e-5, 0.19945),
    row(1.0, 0.01, 1000, 1e-10, 3.29042),
    row(2.0, 1e-4, 10**6, 1e-6, 0.20315),
]


@pytest.fixture
def without_pld(monkeypatch):
    """As where neither PLD nor dp-accounting have an answer."""
    monkeypatch.setattr(pld, "upper", lambda *_, **__: None)
    monkeypatch.setattr(library, "upper", lambda *_, **__: None)


TABLE = [
    param if number in (0, 2, 11, 12) else pytest.param(*param.values, marks=pytest.mark.slow)
    for number, param in enumerate(PLD_UPPER)
]


@pytest.mark.parametrize(("sigma", "q", "num_steps", "delta", "epsilon"), TABLE)
def test_the_bound_is_that_of_the_reference_table(sigma, q, num_steps, delta, epsilon):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.upper == pytest.approx(epsilon, abs=1e-3, rel=1e-3)
    assert bounds.lower <= epsilon + 1e-4
    assert 0 <= bounds.lower <= bounds.estimate <= bounds.upper
    assert bounds.accountant in ("analytic", "prv", "pld")


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "q", "num_steps", "delta", "epsilon"), PLD_UPPER)
def test_without_pld_the_bound_encloses_the_table(sigma, q, num_steps, delta, epsilon, without_pld):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.lower - 1e-3 <= epsilon <= bounds.upper + 1e-3
    assert bounds.accountant in ("analytic", "prv", "rdp")
    # One row needs a grid that nobody would wait for.
    assert bounds.upper <= (0.2296 if num_steps == 10**6 else 1.005 * epsilon + 1e-3)


def second_library(sigma, q, num_steps, delta, *, pessimistic, grid=1e-4):
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


@pytest.mark.parametrize(
    ("q", "sigma", "num_steps", "delta"),
    [(0.05, 0.8, 50, 1e-5), (0.3, 2.0, 30, 1e-6), (0.001, 1.2, 300, 1e-5), (0.9, 5.0, 40, 1e-4)],
)
def test_bounds_overlap_with_those_of_a_second_library(q, sigma, num_steps, delta):
    """Zero-out adjacency from above, add-remove from below: ε is the same for both."""
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    setting = (sigma, q, num_steps, delta)
    assert bounds.upper >= second_library(*setting, pessimistic=False)
    assert bounds.lower <= second_library(*setting, pessimistic=True)


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
    assert 1.01 * compute_epsilon(**BASE).upper < compute_epsilon(**BASE | {name: worse}).upper


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


def replace_accountant(monkeypatch, epsilon):
    """``epsilon(q, sigma, num_steps, delta)`` in the place of the accountants'."""

    def composed(charges, delta, adjacency, eps_error):
        (charge,) = charges
        return epsilon(*charge[:3], delta)

    monkeypatch.setattr(composition, "composed", composed)


def test_spent_leaves_the_tail_out_of_what_the_accountant_gets(monkeypatch):
    seen = []

    def recorded(q, sigma, num_steps, delta):
        seen.append((q, sigma, num_steps, delta))
        return Epsilon(1.0, 2.0, 3.0, "prv")

    replace_accountant(monkeypatch, recorded)
    monkeypatch.setattr(composition, "noise_tail_delta", lambda *_: 2e-9)
    assert spent(0.1, 2.0, 10, 1e-5, 100) == (1.0, 2.0, 3.0, "prv")
    assert seen == [(0.1, 2.0, 10, 1e-5 - 2e-9)]


def test_the_tails_of_all_charges_come_off_delta(monkeypatch):
    seen = []
    monkeypatch.setattr(composition, "noise_tail_delta", lambda q, *_: 1e-9 * q)
    monkeypatch.setattr(
        composition, "composed", lambda charges, delta, *_: seen.append((charges, delta))
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


PLAN = PrivacyPlan(
    sampling_rate=0.1,
    noise_multiplier=2.0,
    num_steps=10,
    max_grad_norm=1.0,
    delta=1e-5,
    public_dataset_size=1000,
    adjacency="add-remove",
    draws_per_record=1,
    trainable_parameters=100,
)


@pytest.mark.parametrize("share", [1.01, 0.99])
def test_a_plan_whose_tail_is_above_a_thousandth_of_delta_is_refused(share, monkeypatch):
    """What has run is priced nevertheless, at what the tail leaves of delta."""
    replace_accountant(monkeypatch, lambda *_: Epsilon(1.0, 2.0, 3.0, "prv"))
    monkeypatch.setattr(composition, "noise_tail_delta", lambda *_: share * 1e-8)
    assert spent(0.1, 2.0, 10, 1e-5, 100).upper == 3.0
    if share > 1:
        with pytest.raises(AccountingError, match=r"tail .* delta/1000"):
            plan_epsilon(PLAN)
    else:
        assert plan_epsilon(PLAN).upper == 3.0


@pytest.mark.parametrize("share", [1.01, 0.99])
def test_a_tail_that_is_all_of_delta_is_refused(share, monkeypatch):
    replace_accountant(monkeypatch, lambda q, sigma, num_steps, delta: Epsilon(0, 0, delta, "pld"))
    monkeypatch.setattr(composition, "noise_tail_delta", lambda *_: share * 1e-5)
    if share > 1:
        with pytest.raises(AccountingError, match="tail"):
            spent(0.1, 2.0, 10, 1e-5, 100)
    else:
        assert spent(0.1, 2.0, 10, 1e-5, 100).upper == pytest.approx(1e-7)


@pytest.mark.parametrize("sigma", [0.2, 0.1, 0.01, 1e-6, 1e-100, 1e-200], ids="{:g}".format)
def test_little_noise_is_refused_for_its_tail(sigma):
    with pytest.raises(AccountingError, match="tail"):
        spent(1.0, sigma, 10**4, 1e-5, 1000)


def test_no_steps_spend_nothing_and_no_noise_spends_everything():
    assert spent(0.1, 2.0, 0, 1e-5, 100) == (0, 0, 0, "exact")
    assert spent(0.1, 0.0, 1, 1e-5, 100) == (math.inf, math.inf, math.inf, "exact")


@pytest.mark.parametrize("eps_error", [0.002, 0.05])
def test_a_mechanism_that_costs_nothing_has_epsilon_zero(eps_error):
    """δ alone covers a record that is hardly ever drawn; rounding may put the estimate below 0."""
    bounds = accounting.compute_epsilon(1e-4, 10.0, 2, 1e-6, eps_error=eps_error)
    assert 0 == bounds.lower <= bounds.estimate <= bounds.upper <= eps_error


def failing(error):
    def call(_):
        raise error

    return call


class Answering:
    """A PRV accountant that answers with what is no bound."""

    def __init__(self, *answer):
        self.answer = answer

    def __call__(self, _):
        return self

    def compute_composition(self, steps):
        return self

    def compute_epsilon(self, delta, delta_error, eps_error):
        return self.answer


@pytest.mark.parametrize(
    "broken",
    [
        failing(RuntimeError("Discrete mean differs from continuous mean significantly.")),
        failing(ValueError("Cannot compute epsilon for given delta")),
        failing(FloatingPointError()),
        failing(MemoryError()),
        Answering(math.nan, math.nan, math.nan),
        Answering(1.0, 2.0, math.inf),
        Answering(2.0, 1.0, 3.0),
        Answering(50.0, 51.0, 52.0),
    ],
)
def test_where_pld_has_no_answer_prv_and_then_rdp_have_one(broken, without_pld, monkeypatch):
    truth = second_library(2.0, 0.1, 10, 1e-5, pessimistic=True)
    by_prv = compute_epsilon(**BASE)
    assert by_prv.accountant == "prv"
    assert by_prv.lower <= truth and by_prv.upper == pytest.approx(truth, abs=2e-3)
    monkeypatch.setattr(prv, "Heterogeneous", broken)
    by_rdp = compute_epsilon(**BASE)
    assert by_rdp.accountant == "rdp" and truth <= by_rdp.upper <= 1.5 * truth


@pytest.mark.parametrize(
    ("sigma", "q", "num_steps", "delta"),
    [(1.0898, 0.11237, 260, 1e-4), (0.70895, 0.13627, 185, 1e-4), (0.824, 0.1205, 212, 1e-6)],
)
def test_a_kink_between_the_points_of_an_integral_stops_nothing(
    sigma, q, num_steps, delta, without_pld
):
    """ln(1 - q) just below -0.1, where the package's own mean is wrong."""
    truth = second_library(sigma, q, num_steps, delta, pessimistic=True, grid=1e-3)
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.accountant == "prv"
    assert bounds.lower <= truth and bounds.upper == pytest.approx(truth, rel=2e-3)


def test_a_lower_bound_below_zero_is_zero(without_pld, monkeypatch):
    monkeypatch.setattr(prv, "Heterogeneous", Answering(-0.5, 0.1, 0.7))
    assert compute_epsilon(**BASE) == (0.0, 0.1, 0.7, "prv")


@pytest.mark.parametrize(
    ("sigma", "q", "num_steps", "delta", "epsilon"),
    [
        (0.5, 0.2, 5000, 1e-5, 1085.26),
        (0.3, 0.01, 1000, 1e-5, 69.8157),
        (1.0, 0.01, 1000, 1e-15, 4.855),
    ],
)
def test_a_setting_at_which_others_fail_has_its_bound(sigma, q, num_steps, delta, epsilon):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.upper == pytest.approx(epsilon, rel=1e-3)
    assert bounds.accountant == "pld"


def test_a_setting_beyond_float64_says_what_to_change():
    with pytest.raises(AccountingError, match=r"cannot be certified .* choose .* larger delta"):
        compute_epsilon(0.01, 1e-160, 1000, 1e-5)


def test_replace_one_is_the_pair_of_mixtures():
    bounds = compute_epsilon(0.01, 1.0, 1000, 1e-5, "replace-one")
    assert bounds.upper == pytest.approx(2.8434, abs=1e-3)
    assert bounds.accountant == "pld"
    # Neither the price of add-remove, nor that of a doubled bound.
    assert compute_epsilon(0.01, 1.0, 1000, 1e-5).upper < 1.9
    assert compute_epsilon(0.01, 0.5, 1000, 1e-5).upper > 13


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_replace_one_of_all_records_is_a_gaussian_of_twice_the_shift(sigma):
    bounds = compute_epsilon(1.0, sigma, 3, 1e-5, "replace-one")
    exact = gaussian_dp_epsilon(2 * math.sqrt(3) / sigma, 1e-5)
    assert exact - 1e-6 <= bounds.upper <= exact + 1e-3


@pytest.mark.parametrize("epsilon", [-0.3, 0.0, 0.5, 2.0])
def test_no_two_contributions_are_further_apart_than_opposite_ones(epsilon):
    """The proof in ``composition``: the largest P(S) - e^ε Q(S) integrates the positive part."""
    q, sigma = 0.3, 1.0
    x, y = np.meshgrid(np.linspace(-8, 8, 321), np.linspace(-8, 8, 321))

    def density(u):
        return np.exp(-((x - u[0]) ** 2 + (y - u[1]) ** 2) / (2 * sigma**2))

    def divergence(u, v):
        above = (1 - q) * density((0, 0)) + q * density(u)
        below = (1 - q) * density((0, 0)) + q * density(v)
        cell = (16 / 320) ** 2 / (2 * math.pi * sigma**2)
        return np.maximum(above - math.exp(epsilon) * below, 0).sum() * cell

    worst = divergence((1, 0), (-1, 0))
    for angle in np.linspace(0, math.pi, 9):
        for length in (0.0, 0.5, 1.0):
            v = (length * math.cos(angle), length * math.sin(angle))
            assert divergence((1, 0), v) <= worst + 1e-6
            assert divergence((0.6, 0), v) <= worst + 1e-6


def test_replace_one_is_not_priced_by_what_does_not_know_it(without_pld):
    with pytest.raises(AccountingError, match="cannot be certified"):
        compute_epsilon(**BASE, adjacency="replace-one")
    with pytest.raises(AccountingError, match="cannot be certified"):
        second_opinion([Charge(0.1, 2.0, 10, 100)], 1e-5, "replace-one")


MIXED = [
    Charge(0.02, 1.1, 300, 100),
    Charge(0.1, 2.0, 40, 100),
    Charge(1.0, 8.0, 2, 100),
    Charge(1.0, 6.0, 1, 100),
]


@pytest.mark.parametrize("adjacency", ["add-remove", "zero-out", "replace-one"])
def test_charges_together_are_what_another_accountant_composes(adjacency):
    """Two rates and noises, and full passes, against PLD at a fine grid."""
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if adjacency == "replace-one":
        relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    other = dp_accounting.pld.PLDAccountant(relation, value_discretization_interval=1e-4)
    for charge in MIXED:
        event = dp_accounting.GaussianDpEvent(charge.noise_multiplier)
        if charge.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(charge.sampling_rate, event)
        other.compose(event, charge.num_steps)
    truth = other.get_epsilon(1e-5)
    bounds = spent_together(MIXED, 1e-5, adjacency)
    assert bounds.lower <= truth + 1e-4
    assert truth - 1e-4 <= bounds.upper <= truth * (1 + 1e-3) + 1e-3
    opinion = second_opinion(MIXED, 1e-5, adjacency)
    assert opinion.accountant == ("dp-accounting" if adjacency == "replace-one" else "prv")
    assert opinion.upper == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize(
    ("first", "second"),
    [("pld", "prv"), ("prv", "pld"), ("rdp", "pld"), ("analytic", "pld"), ("dp-accounting", "pld")],
)
def test_a_second_opinion_is_not_by_the_first_accountant(first, second):
    opinion = second_opinion(MIXED, 1e-5, first=first)
    assert opinion.accountant == second
    assert opinion.upper == pytest.approx(spent_together(MIXED, 1e-5).upper, rel=2e-3)


def test_a_second_opinion_is_by_rdp_where_no_other_answers(without_pld, monkeypatch):
    claim = spent_together(MIXED, 1e-5)
    monkeypatch.setattr(prv, "bounds", lambda *_, **__: None)
    opinion = second_opinion(MIXED, 1e-5)
    assert (claim.accountant, opinion.accountant) == ("prv", "rdp")
    assert claim.lower <= opinion.upper <= 1.3 * claim.upper
    assert second_opinion([], 1e-5) == spent_together([], 1e-5)
    assert second_opinion([Charge(0.1, 0.0, 1, 9)], 1e-5).upper == math.inf


def test_the_tail_of_replace_one_is_that_of_twice_the_shift():
    once = accounting.noise_tail_delta(0.1, 0.8, 10, 100, "replace-one")
    assert once == accounting.noise_tail_delta(0.1, 0.4, 10, 100)
    assert once > 2 * accounting.noise_tail_delta(0.1, 0.8, 10, 100, "zero-out")


@settings(deadline=None, max_examples=4, derandomize=True)
@given(
    sigma=st.floats(0.7, 5),
    q=st.floats(0.01, 0.5),
    num_steps=st.integers(2, 40),
    factor=st.floats(1.3, 2),
    adjacency=st.sampled_from(["add-remove", "replace-one"]),
)
def test_more_noise_fewer_steps_lower_rate_and_larger_delta_cost_less(
    sigma, q, num_steps, factor, adjacency
):
    cost = compute_epsilon(q, sigma, num_steps, 1e-6, adjacency).upper
    slack = 1e-3 * max(1.0, cost)
    for better in (
        (q, factor * sigma, num_steps, 1e-6),
        (q / factor, sigma, num_steps, 1e-6),
        (q, sigma, max(1, int(num_steps / factor)), 1e-6),
        (q, sigma, num_steps, 1e-6 * factor),
    ):
        assert compute_epsilon(*better, adjacency).upper <= cost + slack
