"""What is charged, when, and what it costs, beside closed forms and Opacus' accountant."""

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from dpengine import Adaptive, PrivacyEngine, PrivacyError
from dpengine.accounting import spent
from dpengine.dropin.accountant import Accountant, Budget, Mechanism
from dpengine.mechanism.secure_random import SecureRandom

DELTA = 1e-4
EPS_ERROR = 0.002
"""Half of the interval that the accountant certifies: its upper bound is above ε by twice that."""
STEP = Mechanism(0.1, 1.0, 8, "add-remove")


def private(engine, *, n=40, batch_size=10, sigma=1.0, sampler=None, workers=0, **changed):
    module = nn.Linear(3, 2)
    order = {"sampler": sampler} if sampler is not None else {}
    return engine.make_private(
        module=module,
        optimizer=SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            TensorDataset(torch.ones(n, 3)), batch_size=batch_size, num_workers=workers, **order
        ),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        **changed,
    )


def use(module, optimizer, x):
    module(x).sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().clone().flatten() for p in module.parameters()])


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang (arXiv 1805.06530), theorem 8: δ(ε) = Φ(1/2σ - εσ) - e^ε Φ(-1/2σ - εσ)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return brentq(excess, 0, 200)


@pytest.mark.parametrize(("sigma", "n_passes"), [(0.8, 1), (2.0, 3), (5.0, 7)])
@pytest.mark.parametrize("physical", [None, 4])
def test_a_pass_in_ones_own_order_costs_one_gaussian(sigma, n_passes, physical):
    engine = PrivacyEngine()
    module, optimizer, loader = private(
        engine, sigma=sigma, poisson_sampling=False, static_batch=physical
    )
    for _ in range(n_passes):
        for (x,) in loader:
            use(module, optimizer, x)

    assert engine.accountant.history == [(sigma, 1.0, n_passes)]
    exact = gaussian_epsilon(sigma / math.sqrt(n_passes), DELTA)
    with pytest.warns(UserWarning, match=f"{n_passes} passes over the data in an order"):
        epsilon = engine.get_epsilon(DELTA)
    assert exact <= epsilon <= exact + 2 * EPS_ERROR + 0.01 * exact
    assert f"{n_passes} passes over all records without ampl" in engine.guarantee(DELTA)
    assert "replacing one record" in engine.guarantee(DELTA)


def test_poisson_batches_cost_what_opacus_prints_and_no_less():
    engine = PrivacyEngine()
    module, optimizer, loader = private(engine, sample_rate=0.25)
    for _ in range(5):
        for (x,) in loader:
            use(module, optimizer, x)
    theirs = PRVAccountant()
    for _ in range(20):
        theirs.step(noise_multiplier=1.0, sample_rate=0.25)

    assert engine.accountant.history == theirs.history == [(1.0, 0.25, 20)]
    epsilon = engine.get_epsilon(DELTA)  # without a warning
    # Theirs is the upper end of an interval of 0.01 each way.
    assert -0.02 <= epsilon - theirs.get_epsilon(DELTA) <= 2 * EPS_ERROR
    assert "adding or removing one record" in engine.guarantee(DELTA)


def test_different_mechanisms_are_composed():
    accountant, theirs = Accountant(), PRVAccountant()
    for sigma, rate, times in ((1.0, 0.05, 30), (0.9, 0.02, 20), (1.0, 0.05, 10)):
        for _ in range(times):
            accountant.charge(Mechanism(rate, sigma, 8, "add-remove"))
            theirs.step(noise_multiplier=sigma, sample_rate=rate)

    assert sorted(accountant.history) == [(0.9, 0.02, 20), (1.0, 0.05, 40)]
    assert len(accountant) == 60
    assert accountant.get_epsilon(DELTA) == pytest.approx(theirs.get_epsilon(DELTA), abs=0.025)


def test_passes_and_samples_cost_more_than_either():
    both, passes, samples = Accountant(), Accountant(), Accountant()
    for accountant in (both, passes):
        accountant.charge(Mechanism(1.0, 2.0, 8, "zero-out", is_own_order=True))
    for accountant in (both, samples):
        for _ in range(20):
            accountant.charge(STEP)

    a, b = passes.get_epsilon(DELTA), samples.get_epsilon(DELTA)
    assert max(a, b) + 0.05 < both.get_epsilon(DELTA) <= a + b
    assert (both.passes, samples.passes) == (1, 0)
    assert (both.adjacency, samples.adjacency) == ("zero-out", "add-remove")


@pytest.mark.parametrize("public", [{}, {"sample_rate": 0.2}], ids=["true size", "public rate"])
def test_a_record_replaced_by_any_other_costs_what_its_own_accountant_says(public):
    engine = PrivacyEngine()
    next(iter(private(engine, adjacency="replace-one", **public)[2]))

    (sigma, rate, times), *_ = engine.accountant.history
    values = next(iter(engine.accountant.state_dict()["runs"].values()))[0][2]
    truth = spent(rate, sigma, times, DELTA, values, "replace-one")
    assert engine.get_epsilon(DELTA) == truth.upper
    assert engine.get_epsilon(DELTA) > spent(rate, sigma, times, DELTA, values).upper
    assert "replacing one record by any other" in engine.guarantee(DELTA)


@pytest.mark.parametrize("given", [{}, {"sample_rate": 0.25}], ids=["true size", "public rate"])
def test_a_budget_for_a_record_replaced_by_any_other_holds_for_it(given):
    """Of every step that is planned, at the noise that was chosen, by the price of replacing."""
    engine, module = PrivacyEngine(), nn.Linear(3, 2)
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.ones(40, 3)), batch_size=10),
        max_grad_norm=1.0,
        target_epsilon=3.0,
        target_delta=DELTA,
        epochs=1,
        adjacency="replace-one",
        **given,
    )
    for (x,) in loader:
        use(module, optimizer, x)
    ((sigma, rate, times),) = engine.accountant.history
    assert 2.999 <= engine.get_epsilon(DELTA) <= 3.0
    assert spent(rate, sigma, times, DELTA, 10, "replace-one").upper == pytest.approx(3.0, 1e-3)
    assert spent(rate, sigma, times, DELTA, 10).upper < 2.7


@pytest.mark.parametrize("changed", [{"adjacency": "add-remove"}, {"adjacency": "nearby"}])
def test_an_adjacency_that_the_public_numbers_do_not_give_is_refused(changed):
    with pytest.raises(ValueError, match="adjacency must be 'replace-one' or left out"):
        private(PrivacyEngine(), **changed)


def test_nothing_spent_and_everything_spent():
    accountant = Accountant()
    assert accountant.get_epsilon(DELTA) == 0 and len(accountant) == 0
    accountant.charge(Mechanism(0.01, 0.0, 8, "add-remove"))
    assert accountant.get_epsilon(DELTA) == math.inf


def test_the_noised_count_of_adaptive_clipping_is_noised_too():
    noised = []
    for clipping in ("flat", Adaptive(1.0, 5.0)):
        engine = PrivacyEngine()
        next(iter(private(engine, clipping=clipping)[2]))
        ((entry,),) = engine.accountant.state_dict()["runs"].values()
        noised.append(entry[2])

    # The weights, and a pair of normals for the count; an adaptive optimizer takes any batches.
    assert noised == [10, 10]


@pytest.mark.parametrize(
    ("changed", "adjacency"),
    [
        ({}, "zero-out"),
        ({"sample_rate": 0.2}, "add-remove"),
        ({"poisson_sampling": False}, "zero-out"),
        ({"unit_ids": np.arange(40) // 2}, "zero-out"),
    ],
)
def test_the_true_size_is_public_unless_a_rate_is_given(changed, adjacency):
    engine = PrivacyEngine()
    next(iter(private(engine, **changed)[2]))

    assert engine.accountant.adjacency == adjacency


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_charged_before_its_coins(workers, monkeypatch):
    engine, spent = PrivacyEngine(), []
    bernoulli = SecureRandom.bernoulli

    def toss(*arguments):
        spent.append(len(engine.accountant))
        return bernoulli(*arguments)

    monkeypatch.setattr(SecureRandom, "bernoulli", toss)
    module, optimizer, loader = private(engine, workers=workers)
    for (x,) in loader:
        use(module, optimizer, x)
    assert spent == [1, 2, 3, 4]


@pytest.mark.parametrize("changed", [{}, {"poisson_sampling": False}])
def test_a_charge_that_fails_draws_nothing(changed, monkeypatch):
    engine, drawn = PrivacyEngine(), []
    monkeypatch.setattr(SecureRandom, "bernoulli", lambda *arguments: drawn.append(arguments))
    loader = private(engine, **changed)[2]
    monkeypatch.setattr(Accountant, "charge", lambda *arguments: 1 / 0)
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda *index: drawn.append(index))

    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
    assert drawn == []


def test_a_peek_is_charged_and_so_are_batches_that_workers_drew_ahead():
    for workers, n_charged in ((0, 1), (2, 4)):
        engine = PrivacyEngine()
        iterator = iter(private(engine, workers=workers)[2])
        next(iterator)
        # Two workers with two batches each, of the four of this pass.
        assert len(engine.accountant) == n_charged
        del iterator


def test_a_record_twice_in_a_pass_is_refused_before_its_batch():
    sampler = [*range(15), 3, *range(15, 39)]  # record 3 again, in the second batch
    engine = PrivacyEngine()
    module, optimizer, loader = private(engine, sampler=sampler, poisson_sampling=False)
    iterator = iter(loader)
    use(module, optimizer, next(iterator)[0])
    before = weights(module)
    with pytest.raises(PrivacyError, match="a record twice in one pass"):
        next(iterator)
    assert torch.equal(weights(module), before)
    # 40 draws out of 40 are all different with probability 40! / 40^40 < 1e-16.
    sampler = WeightedRandomSampler([1.0] * 40, 40, replacement=True)
    module, optimizer, loader = private(engine, sampler=sampler, poisson_sampling=False)
    with pytest.raises(PrivacyError, match="a record twice in one pass"):
        for (x,) in loader:
            use(module, optimizer, x)


def test_a_record_twice_in_a_batch_is_refused():
    loader = private(PrivacyEngine(), sampler=[0, 1, 0], poisson_sampling=False)[2]
    with pytest.raises(PrivacyError, match="a record twice in one pass"):
        next(iter(loader))


def test_a_record_under_two_numbers_is_refused():
    loader = private(PrivacyEngine(), sampler=[39, -1], poisson_sampling=False)[2]
    with pytest.raises((PrivacyError, ValueError)):
        next(iter(loader))


def test_a_sum_never_goes_on_into_the_next_pass():
    """One record, a bound of 1: a sum of two passes would move the weights twice as far."""
    engine = PrivacyEngine()
    module, optimizer, loader = private(
        engine, n=1, batch_size=1, sigma=0.0, poisson_sampling=False, loss_reduction="sum"
    )
    before = weights(module)
    for skip in (True, False):
        for (x,) in loader:
            optimizer.signal_skip_step(skip)
            module(100 * x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert len(engine.accountant) == 2
    assert float((weights(module) - before).norm()) == pytest.approx(0.1, rel=1e-4)


def test_a_sum_goes_on_within_a_pass_where_it_is_told_to():
    module, optimizer, loader = private(
        PrivacyEngine(), n=4, batch_size=1, sigma=0.0, poisson_sampling=False, loss_reduction="sum"
    )
    before = weights(module)
    for number, (x,) in enumerate(loader):
        optimizer.signal_skip_step(number < 3)
        module(100 * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert float((weights(module) - before).norm()) == pytest.approx(0.4, rel=1e-4)


def test_a_budget_refuses_what_was_not_planned_and_charges_nothing_for_it():
    accountant = Accountant()
    budget = Budget(accountant, STEP, 3)
    for left in (3, 2, 1):
        assert budget.remaining == left
        budget.reserve()
    for _ in range(2):
        with pytest.raises(PrivacyError, match="all 3 planned draws are charged"):
            budget.reserve()
    assert len(accountant) == 3 and budget.remaining == 0
    assert Budget(accountant, STEP, None).remaining == math.inf


def copied(accountant: Accountant) -> dict:
    return json.loads(json.dumps(accountant.state_dict()))


def test_two_runs_from_one_state_add_up():
    first = Accountant()
    for _ in range(5):
        first.charge(STEP)
    states = [copied(first)]
    for n in (2, 7):
        resumed = Accountant()
        resumed.load_state_dict(states[0])
        for _ in range(n):
            resumed.charge(STEP)
        assert len(resumed) == 5 + n
        states.append(copied(resumed))

    for order in itertools.permutations([*states, *states]):
        merged = Accountant()
        for state in order[:4]:
            before = len(merged)
            merged.load_state_dict(state)
            assert len(merged) >= max(before, len(resumed) if state is states[2] else 5)
        assert len(merged) == sum((5, *[n for n, s in ((2, 1), (7, 2)) if states[s] in order[:4]]))


def test_an_older_state_of_the_same_run_lowers_nothing():
    accountant = Accountant()
    accountant.charge(STEP)
    older = copied(accountant)
    accountant.charge(STEP)
    accountant.charge(STEP._replace(noise_multiplier=2.0))
    for _ in range(3):
        accountant.load_state_dict(older)
    assert sorted(accountant.history) == [(1.0, 0.1, 2), (2.0, 0.1, 1)]


def test_a_state_is_json_and_keeps_every_number():
    accountant = Accountant()
    accountant.charge(Mechanism(1 / 3, math.pi, 12, "zero-out"))
    other = Accountant()
    other.load_state_dict(copied(accountant))

    assert other.history == accountant.history and other.adjacency == "zero-out"
    assert other.get_epsilon(DELTA) == accountant.get_epsilon(DELTA)


GOOD = [0.1, 1.0, 8, "add-remove", 3]


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"runs": None},
        {"runs": [1]},
        {"runs": {"a": [GOOD], "b": [[]]}},
        {"runs": {"a": [GOOD], "b": [[0.1, 1.0, 3]]}},
        *[{"runs": {"a": [GOOD], "b": [[*GOOD[:4], n]]}} for n in (0, -1, 1.5, True, "3", None)],
    ],
)
def test_a_state_that_cannot_be_read_changes_nothing(state):
    accountant = Accountant()
    accountant.charge(STEP)
    before = accountant.state_dict()
    with pytest.raises(ValueError, match="what was spent is unknown"):
        accountant.load_state_dict(state)
    assert accountant.state_dict() == before


@pytest.mark.parametrize(
    "entry",
    [
        [0.0, 1.0, 8, "add-remove", 3],
        [1.5, 1.0, 8, "add-remove", 3],
        [0.1, -1.0, 8, "add-remove", 3],
        [0.1, "1", 8, "add-remove", 3],
        [0.1, math.nan, 8, "add-remove", 3],
        [0.1, 1.0, 0, "add-remove", 3],
        [0.1, 1.0, 8, "zerp-out", 3],
    ],
)
def test_a_mechanism_that_does_not_exist_is_refused(entry):
    accountant = Accountant()
    with pytest.raises(ValueError, match="what was spent is unknown"):
        accountant.load_state_dict({"runs": {"a": [entry]}})
    assert len(accountant) == 0


def test_the_accountant_is_named_as_in_opacus():
    assert Accountant.mechanism() == PRVAccountant.mechanism() == "prv"
    for kind in ("rdp", "gdp", "PRV", None):
        with pytest.raises(ValueError, match="accountant must be 'prv'"):
            PrivacyEngine(accountant=kind)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_what_a_copy_charges_adds_to_what_the_original_does(make):
    accountant = Accountant()
    accountant.charge(STEP)
    twin = make(accountant)
    for charged, n in ((accountant, 3), (twin, 2)):
        for _ in range(n):
            charged.charge(STEP)
    accountant.load_state_dict(twin.state_dict())
    assert len(accountant) == 1 + 3 + 2


def test_a_fork_charges_nothing(monkeypatch):
    """The engine it was forked from would not know of it."""
    accountant = Accountant()
    accountant.charge(STEP)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("os.getpid", lambda: -1)
        with pytest.raises(PrivacyError, match="process's own"):
            accountant.charge(STEP)
    accountant.charge(STEP)
    assert len(accountant) == 2


def test_a_claim_names_the_unit_and_is_of_one_kind():
    """One record less of a person changes that person's contribution, and is not covered."""
    engine = PrivacyEngine()
    next(iter(private(engine, unit_ids=np.arange(40) // 2)[2]))
    assert "one unit, all records of one person" in engine.guarantee(DELTA)
    with pytest.raises(PrivacyError, match="no claim in common"):
        private(engine)
    of_records = PrivacyEngine()
    next(iter(private(of_records)[2]))
    assert "one record" in of_records.guarantee(DELTA)
    charged = of_records.accountant
    charged.load_state_dict(engine.accountant.state_dict())
    with pytest.raises(PrivacyError, match="no claim in common"):
        of_records.get_epsilon(DELTA)
