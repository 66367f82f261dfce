"""The claim of a run, in JSON and in sentences."""

import json
import math
import re
from pathlib import Path

import pytest

from dpengine import accounting, report
from dpengine.plan import PrivacyPlan
from dpengine.settings import Settings


def plan(**changes) -> PrivacyPlan:
    fields = {
        "sampling_rate": 1.0,
        "noise_multiplier": 2.5,
        "num_steps": 20,
        "max_grad_norm": 0.01,
        "delta": 1e-4,
        "public_dataset_size": 1437,
        "adjacency": "zero-out",
        "draws_per_record": 16,
        "trainable_parameters": 3000,
    }
    return PrivacyPlan(**(fields | changes))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ of the Gaussian mechanism with sensitivity over deviation μ (Balle and Wang 2018)."""
    from scipy.stats import norm

    tail = math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    return norm.cdf(-epsilon / mu + mu / 2) - tail


def test_the_claimed_epsilon_is_an_upper_bound_of_the_closed_form():
    claim = report.privacy_report(plan(), [])
    mu = math.sqrt(20) / 2.5
    assert gaussian_delta(claim["epsilon"]["upper"], mu) <= 1e-4
    assert gaussian_delta(claim["epsilon"]["lower"], mu) >= 1e-4


def test_the_report_is_strict_json_even_without_noise():
    text = report.to_json(report.privacy_report(plan(noise_multiplier=0.0), []))
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["private"] is False
    assert content["epsilon"] == {"lower": "inf", "estimate": "inf", "upper": "inf"}


def test_the_claim_covers_the_planned_steps():
    one, two = (report.privacy_report(plan(num_steps=steps), []) for steps in (20, 40))
    assert two["epsilon"]["upper"] > one["epsilon"]["upper"]


@pytest.mark.parametrize("adjacency", ["zero-out", "add-remove", "replace-one"])
def test_the_card_states_unit_adjacency_mechanism_and_numbers(adjacency):
    claim = report.privacy_report(plan(adjacency=adjacency), [])
    card = report.model_card(Settings(), claim)
    upper = f"{math.ceil(claim['epsilon']['upper'] * 1e4) / 1e4:.4f}"
    for words in (
        upper,
        "0.0001",
        adjacency,
        "one record",
        "Poisson",
        "σ = 2.5",
        "C = 0.01",
        "20 ",
    ):
        assert words in card


@pytest.mark.parametrize(
    ("adjacency", "rate", "accountant"),
    [("zero-out", 1.0, "analytic"), ("zero-out", 0.5, "pld"), ("replace-one", 0.5, "pld")],
)
def test_the_claim_names_who_certified_it(adjacency, rate, accountant):
    claim = report.privacy_report(plan(adjacency=adjacency, sampling_rate=rate), [])
    assert claim["accountant"] == accountant
    assert set(claim["epsilon"]) == {"lower", "estimate", "upper"}
    assert {"numpy", "scipy"} <= set(claim["versions"])
    assert f"`{accountant}`" in report.statement(claim)
    assert f"accountant {accountant})" in report.summary(claim, Path("run"))
    # What only bounds ε from above must not claim a lower bound of 0.
    assert ("≤ ε ≤" in report.statement(claim)) == (accountant == "analytic")


def test_replace_one_is_said_and_its_tail_is_that_of_both_records():
    claim = report.privacy_report(plan(adjacency="replace-one"), [])
    assert "one record is replaced by any other" in report.statement(claim)
    assert claim["noise_tail_delta"] == accounting.noise_tail_delta(1.0, 1.25, 20, 3000)
    assert claim["epsilon"]["upper"] > report.privacy_report(plan(), [])["epsilon"]["upper"]


@pytest.mark.parametrize("sigma", [2.5, 4.3, 3.1, 2.8, 3.7])
def test_no_sentence_claims_less_than_was_certified(sigma):
    """Rounding to the nearest digit would."""
    claim = report.privacy_report(plan(noise_multiplier=sigma, delta=1.0004e-4), [])
    text = report.statement(claim) + report.summary(claim, Path("run"))
    shown = [float(number) for number in re.findall(r"(?:ε|epsilon) = \**([0-9.]+[0-9])", text)]
    assert len(shown) == 2
    assert min(shown) >= claim["epsilon"]["upper"]
    assert text.count("0.00010004") == 2


def test_the_card_of_a_run_without_noise_claims_nothing():
    card = report.model_card(Settings(), report.privacy_report(plan(noise_multiplier=0.0), []))
    assert "is not private" in card
    assert "differential-privacy" not in card
    assert "ε" not in card


def test_the_tail_is_part_of_delta():
    claim = report.privacy_report(plan(), [])
    assert claim["noise_tail_delta"] == accounting.noise_tail_delta(1.0, 2.5, 20, 3000)
    assert claim["delta"] == 1e-4
