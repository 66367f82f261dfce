"""python -m dpengine.verify: a run as it ended is confirmed, and whatever was changed is named."""

import json
import math
import shutil

import numpy as np
import pytest

from dpengine import accounting, finetune, verify
from dpengine.accounting import Epsilon
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run import digests
from dpengine.run.folder import RunFolder
from dpengine.run.ledger import Ledger, LedgerRecord


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("verify")
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    np.savez(folder / "private.npz", images=images, labels=np.arange(24) % 10)
    options = (
        f"--data {folder / 'private.npz'} --num-steps 2 --draws-per-record 2 --num-synthetic 10 "
        f"--physical-batch-size 8 --sampler-steps 2 --delta 1e-3 --output {folder / 'run'}"
    )
    assert finetune.main(options.split()) == 0
    return RunFolder(folder / "run")


@pytest.fixture
def released(finished, tmp_path) -> RunFolder:
    """A copy that a test may change."""
    return RunFolder(shutil.copytree(finished.path, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch):
    """A second opinion that is never the reason."""
    nothing = Epsilon(0.0, 0.0, 0.0, "exact")
    monkeypatch.setattr(accounting, "second_opinion", lambda *_, **__: nothing)


def status(run: RunFolder) -> int:
    return verify.main([str(run.path)])


def edit_report(run: RunFolder, change) -> None:
    content = json.loads(run.report.read_text())
    change(content)
    run.report.write_text(json.dumps(content, indent=2) + "\n")


def test_a_run_as_it_ended_is_verified(released, capsys):
    assert status(released) == 0
    printed = capsys.readouterr().out
    claimed = json.loads(released.report.read_text())["epsilon"]["upper"]
    assert f"epsilon: {claimed:.4f} claimed by analytic, at most" in printed and "by pld" in printed
    assert "2 of 2 steps charged, chain unbroken" in printed
    assert printed.endswith("verified\n") and "WRONG" not in printed


def test_an_edit_of_any_field_of_the_report_is_found(released, quick, capsys):
    original = released.report.read_text()
    for name, value in json.loads(original).items():
        for changed in (None, 0, "other", [value]):
            if changed == value:
                continue
            edit_report(released, lambda content, n=name, v=changed: content.update({n: v}))
            assert status(released) == 1, name
            released.report.write_text(original)
        edit_report(released, lambda content, n=name: content.pop(n))
        assert status(released) == 1, name
        released.report.write_text(original)
    capsys.readouterr()
    edit_report(released, lambda content: content.update(noise_multiplier=9.0))
    assert status(released) == 1
    assert "WRONG: the report's noise_multiplier is 9.0" in capsys.readouterr().out


def test_a_change_of_any_released_file_is_found(released, quick, capsys):
    names = [file.name for file in released.path.iterdir() if file.is_file()]
    assert len(names) == 7
    for name in names:
        file = released.path / name
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert status(released) in ((2,) if name == "ledger.jsonl" else (1,)), name
        file.unlink()
        assert status(released) in ((2,) if name == "ledger.jsonl" else (1,)), name
        file.write_bytes(content)
    assert status(released) == 0
    assert "samples.png is missing" in capsys.readouterr().out


@pytest.mark.parametrize("line", [0, 1, 2, 3])
def test_a_ledger_without_one_of_its_lines_is_found(released, quick, line, capsys):
    lines = released.ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    released.ledger.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    assert status(released) == 2
    assert ("not released" if line == 3 else "damaged") in capsys.readouterr().err


def reseal(run: RunFolder) -> None:
    """As somebody does who forges the report and closes the ledger again."""
    ledger = Ledger.open(run.ledger)
    files = [file for file in run.path.iterdir() if file.is_file() and file != run.ledger]
    ledger.seal({file.name: digests.sha256(file.read_bytes()) for file in files})
    ledger.close()


@pytest.mark.parametrize("lower", [0.9, 0.998])
def test_a_claim_below_the_ledger_s_epsilon_is_found_though_it_is_sealed(released, lower, capsys):
    edit_report(released, lambda c: c["epsilon"].update(upper=lower * c["epsilon"]["upper"]))
    reseal(released)
    assert status(released) == 1
    assert "epsilon is claimed to be" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["noise_multiplier", "num_steps", "delta", "adjacency", "unit"])
def test_a_field_that_the_ledger_fixes_is_found_though_it_is_sealed(released, quick, field, capsys):
    edit_report(released, lambda content: content.update({field: [content[field]]}))
    reseal(released)
    assert status(released) == 1
    assert f"the report's {field} is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("**ε = ", "**ε = 0.0"),
        ("## Use", "As safe as ε = 0.1.\n\n## Use"),
        ("σ = ", "σ = 9"),
        ("δ = ", "δ = 0.0"),
        (" steps of", "0 steps of"),
    ],
    ids=["epsilon", "another epsilon", "noise", "delta", "steps"],
)
def test_a_card_that_says_other_numbers_is_found_though_it_is_sealed(
    released, quick, capsys, old, new
):
    card = released.card.read_text()
    assert old in card
    released.card.write_text(card.replace(old, new))
    reseal(released)
    assert status(released) == 1
    assert "README.md" in capsys.readouterr().out


def test_a_card_in_other_words_is_as_true(released, quick, capsys):
    """As that of an older version is."""
    card = released.card.read_text()
    reworded = card.replace("The adapter is", "These weights are").replace("## Privacy", "## Claim")
    assert reworded != card
    released.card.write_text(reworded)
    reseal(released)
    assert status(released) == 0


@pytest.mark.parametrize("upper", [math.nan, "nan", -1.0, 10**400])
def test_a_claim_that_is_no_number_is_found(released, upper, capsys):
    edit_report(released, lambda content: content["epsilon"].update(upper=upper))
    reseal(released)
    assert status(released) == 1


def test_a_seal_without_a_file_and_lines_behind_it_are_found(released, quick, capsys):
    with released.ledger.open("ab") as file:
        file.write(b"{")
    assert status(released) == 1
    assert "goes on after its seal" in capsys.readouterr().out
    ledger = Ledger.open(released.ledger)
    ledger.seal({"../other": "0" * 64})
    ledger.close()
    assert status(released) == 1
    printed = capsys.readouterr().out
    assert "no digest of samples.png" in printed and "names '../other'" in printed


def test_without_pld_the_first_accountant_is_asked_again(released, monkeypatch, capsys):
    far_above = Epsilon(0.0, 99.0, 99.0, "rdp")
    monkeypatch.setattr(accounting, "second_opinion", lambda *_, **__: far_above)
    assert status(released) == 0
    edit_report(released, lambda content: content["epsilon"].update(upper=1.0))
    reseal(released)
    assert status(released) == 1


def test_a_claim_without_noise_is_infinite(released, monkeypatch, capsys):
    everything = Epsilon(math.inf, math.inf, math.inf, "exact")
    monkeypatch.setattr(accounting, "second_opinion", lambda *_, **__: everything)
    assert status(released) == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert "has no ledger" in capsys.readouterr().err


def claim(upper, accountant):
    def change(content):
        content["epsilon"] = {"lower": 0.0, "estimate": upper, "upper": upper}
        content["accountant"] = accountant

    return change


def only_rdp(monkeypatch):
    for name in ("analytic.bounds", "pld.upper", "prv.bounds", "library.upper"):
        monkeypatch.setattr(f"dpengine.accounting.{name}", lambda *_, **__: None)


@pytest.mark.parametrize("accountant", ["analytic", "pld", "prv", "dp-accounting", "rdp"])
def test_a_claim_below_the_only_bound_there_is_is_not_verified(
    released, accountant, monkeypatch, capsys
):
    """Whatever accountant a forged report names: RDP alone can certify the plan."""
    only_rdp(monkeypatch)
    edit_report(released, claim(1.0, accountant))
    reseal(released)
    assert status(released) == 1
    printed = capsys.readouterr().out
    assert f"WRONG: epsilon is not verified: 1 is claimed by {accountant}" in printed
    assert not printed.endswith("verified\n")


def test_a_bound_that_only_holds_from_below_verifies_nothing(released, monkeypatch, capsys):
    """PRV on a coarse grid: ε lies between 0.5 and 9, and 1.0 is claimed."""
    only_rdp(monkeypatch)
    between = Epsilon(0.5, 1.0, 9.0, "prv")
    monkeypatch.setattr("dpengine.accounting.prv.bounds", lambda *_, **__: between)
    edit_report(released, claim(1.0, "pld"))
    reseal(released)
    assert status(released) == 1
    assert "epsilon is not verified" in capsys.readouterr().out


def test_where_no_second_accountant_answers_nothing_is_verified(released, monkeypatch, capsys):
    only_rdp(monkeypatch)
    monkeypatch.setattr("dpengine.accounting.rdp.upper", lambda *_: math.inf)
    assert status(released) == 1
    assert "WRONG: epsilon is not verified: no accountant can confirm it" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.9, 0.998])
def test_a_small_claim_is_held_to_a_thousandth_of_itself(share):
    """And not to a thousandth, which ε = 0.0159 would lose in."""
    plan = PrivacyPlan(
        sampling_rate=0.01,
        noise_multiplier=8.0,
        num_steps=100,
        max_grad_norm=1.0,
        delta=1e-6,
        public_dataset_size=1000,
        adjacency="replace-one",
        draws_per_record=1,
        trainable_parameters=100,
    )
    record = LedgerRecord(plan, "", (), {}, "", None, False)
    bounds = accounting.plan_epsilon(plan)
    assert bounds.upper < 0.1
    assert not verify._epsilon_problems(record, bounds)
    less = bounds._replace(lower=0.0, upper=share * bounds.upper)
    assert "claimed to be" in verify._epsilon_problems(record, less)[0]
