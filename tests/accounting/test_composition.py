"""What charges cost, against a table, a second library and closed forms."""

import math

import dp_accounting
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
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
    pld,
    spent,
    spent_together,
)


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
    """As where dp-accounting is not installed."""
    monkeypatch.setattr(pld, "find_spec", lambda name: None)


QUICK = {"sigma=3,q=0.1,T=512,delta=1e-06", "sigma=10,q=1,T=100,delta=1e-05"}
QUICK |= {"sigma=1,q=0.01,T=1,delta=1e-05"}


@pytest.mark.parametrize(("sigma", "q", "num_steps", "delta", "epsilon"), PLD_UPPER)
def test_the_bound_is_that_of_the_reference_table(sigma, q, num_steps, delta, epsilon):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.upper == pytest.approx(epsilon, abs=1e-3, rel=1e-3)
    assert bounds.lower <= epsilon + 1e-4
    assert 0 <= bounds.lower <= bounds.estimate <= bounds.upper
    assert bounds.accountant in ("prv", "pld")


@pytest.mark.parametrize(
    ("sigma", "q", "num_steps", "delta", "epsilon"),
    [
        param if param.id in QUICK else pytest.param(*param.values, marks=pytest.mark.slow)
        for param in PLD_UPPER
    ],
)
def test_without_the_second_library_the_bound_encloses_the_table(
    sigma, q, num_steps, delta, epsilon, without_pld
):
    bounds = compute_epsilon(q, sigma, num_steps, delta)
    assert bounds.lower - 1e-3 <= epsilon <= bounds.upper + 1e-3
    assert bounds.accountant in ("prv", "rdp")
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


@pytest.mark.parametrize(("share", "refused"), [(1.01, True), (0.99, False)])
def test_a_tail_above_a_thousandth_of_delta_is_refused(share, refused, monkeypatch):
    replace_accountant(monkeypatch, lambda *_: Epsilon(1.0, 2.0, 3.0, "prv"))
    monkeypatch.setattr(composition, "noise_tail_delta", lambda *_: share * 1e-8)
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
    assert spent(0.1, 2.0, 0, 1e-5, 100) == (0, 0, 0, "exact")
    assert spent(0.1, 0.0, 1, 1e-5, 100) == (math.inf, math.inf, math.inf, "exact")


@pytest.mark.parametrize("eps_error", [0.002, 0.05])
def test_a_mechanism_that_costs_nothing_has_epsilon_zero(eps_error):
    """δ alone covers a record that is hardly ever drawn; rounding may put the estimate below 0."""
    bounds = accounting.compute_epsilon(1e-4, 10.0, 2, 1e-6, eps_error=eps_error)
    assert 0 == bounds.lower <= bounds.estimate <= bounds.upper <= eps_error
