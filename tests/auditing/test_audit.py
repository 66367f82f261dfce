"""The command: what it takes, prints, writes, and its exit status."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from dpengine import audit, auditing
from dpengine.audit import AuditSettings, Bound, Part
from dpengine.auditing import Check, gdp_epsilon
from dpengine.auditing.bounds import ErrorRates
from dpengine.auditing.runs import Scores
from dpengine.mechanism import noise

NOISY_MEAN = noise.noisy_mean

MANY = "--multi-step-runs 2 --multi-step-canaries 128 --num-steps 4 --sampling-rate 1"
SMALL = (
    f"--runs 32 --canaries 256 {MANY} --coins 0 --long-run-steps 0 --confidence 0.999999".split()
)


def part(lower=1.0, claimed=2.0, p_value=0.5):
    bounds = [Bound("epsilon", lower, claimed)]
    return Part("one step", bounds, [Check("size of the noise", p_value)], (1.0, 0.9, 1.1))


def test_a_right_engine_ends_in_0_with_bounds_below_claims(tmp_path, capsys):
    output = tmp_path / "audit.json"
    assert audit.main([*SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "one step on all records, 8,192 canaries" in printed
    assert "4 Poisson steps at sampling rate 1, 256 canaries" in printed
    assert "No leak found." in printed
    result = json.loads(output.read_text())
    assert result["findings"] == []
    for found in result["parts"]:
        for bound in found["bounds"]:
            assert f">= {bound['lower']:.4f}" in printed
            if bound["claimed"] is not None:
                assert bound["lower"] <= bound["claimed"]
                assert f"<= {bound['claimed']:.4f}" in printed
    # 4 steps of σ = 1 are one of σ = 1/2.
    claims = [found["bounds"][-2]["claimed"] for found in result["parts"]]
    assert claims == [
        pytest.approx(4.3772, abs=0.005),
        pytest.approx(gdp_epsilon(2, 1e-5), abs=0.005),
    ]


def test_a_leak_ends_in_1_and_says_which(monkeypatch, tmp_path, capsys):
    def less(clipped_sum, noise_multiplier, *rest):
        return NOISY_MEAN(clipped_sum, noise_multiplier / 4, *rest)

    monkeypatch.setattr(noise, "noisy_mean", less)
    output = tmp_path / "audit.json"
    arguments = [*SMALL, "--multi-step-runs", "0", "--output", str(output)]
    assert audit.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "No leak found" not in printed
    assert "epsilon, Gaussian is at least" in printed
    assert "above the claimed 4.37" in printed
    assert len(json.loads(output.read_text())["findings"]) >= 2


def test_the_threads_of_a_caller_stay_what_they_were():
    before = torch.get_num_threads()
    audit.main([*SMALL, "--multi-step-runs", "0"])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("one", "n_findings"),
    [
        (part(), 0),
        (part(lower=2.0), 0),
        (part(lower=2.001), 1),
        (part(lower=float("nan")), 1),
        (part(lower=9.0, claimed=None), 0),
        (part(p_value=1e-4), 0),
        (part(p_value=0.99e-4), 1),
        (part(p_value=float("nan")), 1),
        (part(lower=3.0, p_value=0.0), 2),
    ],
)
def test_what_counts_as_a_finding(one, n_findings):
    assert len(audit.findings([one])) == n_findings


def test_the_false_alarm_rate_is_shared_among_all_checks():
    assert len(audit.findings([part(p_value=0.7e-4)])) == 1
    assert audit.findings([part(p_value=0.7e-4), part()]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise-multiplier", "0"], "noise_multiplier must be a finite number > 0"),
        (["--runs", "0"], "runs must be a whole number of at least 1"),
        (["--canaries", "10"], "canaries must be a multiple of 4 and at least 64"),
        (["--canaries", "66"], "canaries must be a multiple of 4 and at least 64"),
        (["--multi-step-runs", "-1"], "multi_step_runs must be"),
        (["--multi-step-canaries", "62"], "canaries must be a multiple of 4 and at least 64"),
        (["--num-steps", "0"], "num_steps must be"),
        (["--long-run-steps", "-1"], "long_run_steps must be"),
        (["--coins", "-1"], "coins must be"),
        (["--sampling-rate", "2"], "sampling_rate must be"),
        (["--confidence", "1"], "confidence must be"),
        (["--delta", "0.5"], "delta must be"),
        (["--device", "cuda"], "device must be cpu"),
        (["--output", "/nowhere/audit.json"], "output folder '/nowhere' does not exist"),
        (["--output", __file__], "exists; name a new file"),
        (["--noise-multiplier", "0.01"], "epsilon cannot be certified|tail of the noise"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(audit.auditing, "one_step", lambda *_: pytest.fail("work was begun"))
    assert audit.main([*SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert any(part in error for part in message.split("|"))
    assert error.count("\n") == 1


def test_it_takes_no_data_and_no_run_and_says_so(capsys):
    names = {field.name for field in fields(AuditSettings)}
    assert not names & {"data", "run", "base", "resume", "seed"}
    with pytest.raises(SystemExit):
        audit.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "For no private run: it takes no data and no run" in text


@pytest.mark.slow
def test_a_million_canaries_are_told_apart_nearly_as_well_as_can_be(tmp_path):
    """The bound falls short of 1/σ by 0.007 ± 0.0026: 0.985 is reached in 999 audits of 1000."""
    output = tmp_path / "audit.json"
    assert audit.main(["--confidence", "0.95", "--output", str(output)]) == 0
    one, many, long = json.loads(output.read_text())["parts"]
    assert one["bounds"][0]["lower"] >= 0.985
    assert long["title"] == "5000 Poisson steps at sampling rate 0.02, 64 canaries"
    epsilon = many["bounds"][0]
    assert 0.85 * epsilon["claimed"] <= epsilon["lower"] <= epsilon["claimed"]


@pytest.mark.parametrize("name", ["mu", "epsilon, any mechanism", "epsilon, Poisson sampling"])
def test_a_bound_of_any_name_above_its_claim_is_a_finding(name):
    leaking = replace(part(), bounds=[Bound(name, 2.5, 2.0)])
    assert len(audit.findings([leaking])) == 1


def test_thresholds_are_chosen_on_other_canaries_than_they_bound(monkeypatch):
    """Else the bound would be that of the luckiest threshold."""
    rng = np.random.default_rng(0)
    scores = Scores(rng.normal(size=(4, 64)), rng.random((4, 64)) < 0.5, 0, 0)
    chosen_on, bounded_on = [], []

    def choose(values, is_in, **_):
        chosen_on.extend(values)
        return 0.25

    def bound(values, is_in, threshold, confidence):
        bounded_on.extend(values)
        return ErrorRates(0.5, 0.5)

    for name in ("threshold_for_epsilon", "threshold_for_inversion"):
        monkeypatch.setattr(auditing, name, choose)
    monkeypatch.setattr(auditing, "bound_error_rates", bound)
    plan = audit._plan(AuditSettings(), 64, sampling_rate=0.5, num_steps=2)
    audit._bounds(scores, plan, 1.0, 0.95)
    assert len(chosen_on) == len(bounded_on) == 4 * 64
    assert not set(chosen_on) & set(bounded_on)
