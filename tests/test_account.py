"""The planner as a new user runs it."""

import math
import re

import numpy as np
import pytest
from matplotlib import image

from dpengine import account
from dpengine.accounting import EPS_ERROR, spent, spent_together
from dpengine.accounting.charges import AccountingError, Charge
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run.ledger import Ledger

ALL = "--sampling-rate 0.2 --delta 1e-5 --trainable-parameters 5000 "


def asked(options, capsys):
    status = account.main((ALL + options).split())
    said = capsys.readouterr()
    assert said.err == "" and status == 0
    return said.out


def number(text, name):
    return float(re.search(rf"{name} =? ?([0-9.,e-]*[0-9])", text)[1].replace(",", ""))


def test_epsilon_from_noise_and_steps(capsys):
    said = asked("--noise-multiplier 2 --num-steps 30", capsys)
    truth = spent(0.2, 2.0, 30, 1e-5, 5000)
    assert truth.upper <= number(said, "epsilon") <= truth.upper + 1e-4
    assert f"accountant {truth.accountant}" in said and "add-remove" in said


def test_noise_from_epsilon_and_steps(capsys):
    said = asked("--epsilon 3 --num-steps 30", capsys)
    sigma = number(said, "noise multiplier")
    assert spent(0.2, sigma, 30, 1e-5, 5000).upper <= 3
    assert spent(0.2, 0.99 * sigma, 30, 1e-5, 5000).upper > 3
    assert "within the budget of epsilon 3" in said


def test_steps_from_epsilon_and_noise(capsys):
    said = asked("--epsilon 3 --noise-multiplier 3", capsys)
    steps = int(re.search(r"([0-9,]+) steps", said)[1].replace(",", ""))
    assert spent(0.2, 3.0, steps, 1e-5, 5000).upper <= 3
    assert spent(0.2, 3.0, steps + 1, 1e-5, 5000).upper > 3 - 3 * EPS_ERROR


def test_a_plan_above_its_budget_is_named(capsys):
    said = asked("--epsilon 1 --noise-multiplier 1 --num-steps 30", capsys)
    assert "above the budget of epsilon 1" in said


def test_replace_one_costs_more(capsys):
    said = asked("--noise-multiplier 2 --num-steps 30 --adjacency replace-one", capsys)
    assert number(said, "epsilon") > 1.5 * spent(0.2, 2.0, 30, 1e-5, 5000).upper
    assert "(replace-one, accountant pld)" in said


@pytest.mark.parametrize("budget", ["", "--epsilon 4 "])
def test_the_plot_shows_a_rising_curve_and_the_budget(tmp_path, capsys, budget):
    file = tmp_path / "epsilon.png"
    asked(f"{budget}--noise-multiplier 2 --num-steps 30 --plot {file}", capsys)
    pixels = image.imread(file)[..., :3]
    blue = np.abs(pixels - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(-1) < 0.02
    red = np.abs(pixels - [0xD6 / 255, 0x27 / 255, 0x28 / 255]).max(-1) < 0.02
    rows, columns = np.nonzero(blue[: 3 * len(blue) // 4])
    early, late = columns < np.quantile(columns, 0.3), columns > np.quantile(columns, 0.7)
    assert rows[early].mean() > rows[late].mean() + 50
    assert red.any() == bool(budget)


def test_most_steps_is_the_last_within_the_budget():
    for last in (1, 2, 3, 7, 8, 1000, 12345):
        assert account.most_steps(lambda n, last=last: n / last, 1.0) == last


def test_a_budget_below_one_step_or_beyond_all_is_refused():
    with pytest.raises(AccountingError, match="one step already costs epsilon 3"):
        account.most_steps(lambda n: 3.0 * n, 1.0)
    with pytest.raises(AccountingError, match="more than"):
        account.most_steps(lambda n: 0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epsilon 1", "give two of --noise-multiplier, --num-steps and --epsilon"),
        ("", "give two of"),
        ("--epsilon 0 --num-steps 3", "epsilon must be"),
        ("--noise-multiplier -1 --num-steps 3", "noise_multiplier must be"),
        ("--noise-multiplier 1 --num-steps 0", "num_steps must be"),
        ("--noise-multiplier 1 --num-steps 3 --sampling-rate 2", "sampling_rate must be"),
        ("--noise-multiplier 1 --num-steps 3 --delta 1", "delta must lie"),
        ("--noise-multiplier 0.01 --num-steps 3", "the tail of the noise generator"),
        ("--noise-multiplier 1 --num-steps 3 --plot x.pdf", "plot must be the name of a PNG"),
        ("--noise-multiplier 1 --num-steps 3 --plot /nowhere/x.png", "plot must be a new file"),
        ("--runs /nowhere/run", "is not the folder of a run"),
        ("--runs /nowhere/run --epsilon 3", "give --runs alone"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, options, message):
    assert account.main(options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def run(folder, reserved, **changes):
    values = {
        "sampling_rate": 0.25,
        "noise_multiplier": 2.0,
        "num_steps": 3,
        "max_grad_norm": 0.1,
        "delta": 1e-6,
        "public_dataset_size": 1000,
        "adjacency": "zero-out",
        "draws_per_record": 4,
        "trainable_parameters": 100,
    }
    folder.mkdir()
    ledger = Ledger.create(folder / "ledger.jsonl", PrivacyPlan(**(values | changes)))
    for _ in range(reserved):
        ledger.reserve()
    ledger.close()
    return folder


def of_runs(folders, capsys):
    status = account.main(["--runs", *map(str, folders)])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


def test_runs_on_one_data_set_compose(tmp_path, capsys):
    first = run(tmp_path / "first", 3)
    second = run(tmp_path / "second", 2, noise_multiplier=3.0, adjacency="add-remove")
    status, lines, _ = of_runs([first, second], capsys)
    charges = [Charge(0.25, 2.0, 3, 100), Charge(0.25, 3.0, 3, 100)]  # planned, not charged
    together = spent_together(charges, 2e-6).upper  # each run has its own 1e-6
    assert status == 0 and len(lines) == 3
    assert number(lines[0], "epsilon") >= spent_together(charges[:1], 1e-5).upper
    assert "3 planned steps, 2 of them charged" in lines[1]
    assert together <= number(lines[2], "epsilon") <= together + 1e-4
    assert lines[2].endswith("at delta = 2e-06 (zero-out)")


def test_one_run_of_replace_one_makes_all_of_them_that(tmp_path, capsys):
    folders = [run(tmp_path / "first", 3), run(tmp_path / "second", 3, adjacency="replace-one")]
    _, lines, _ = of_runs(folders, capsys)
    truth = spent_together([Charge(0.25, 2.0, 6, 100)], 2e-6, "replace-one").upper
    assert truth <= number(lines[2], "epsilon") <= truth + 1e-3
    assert lines[2].endswith("(replace-one)")


def test_a_run_without_noise_leaves_nothing_to_claim(tmp_path, capsys):
    folders = [run(tmp_path / "first", 3), run(tmp_path / "second", 3, noise_multiplier=0.0)]
    _, lines, _ = of_runs(folders, capsys)
    assert "not private" not in lines[0]
    assert "not private" in lines[1] and "not private" in lines[2]
    assert not math.isnan(number(lines[0], "epsilon"))


def test_records_and_persons_have_no_claim_in_common(tmp_path, capsys):
    folders = [run(tmp_path / "first", 1), run(tmp_path / "second", 1, unit="unit")]
    status, _, error = of_runs(folders, capsys)
    assert status == 2 and "no claim in common" in error


def test_help_says_what_to_give(capsys):
    with pytest.raises(SystemExit) as ended:
        account.main(["--help"])
    assert ended.value.code == 0
    assert "Give two of noise multiplier" in capsys.readouterr().out


def test_a_folder_that_is_named_twice_counts_once(tmp_path, capsys, monkeypatch):
    first = run(tmp_path / "first", 3)
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    _, lines, _ = of_runs([first, "first", tmp_path / "link", "./first/../first"], capsys)
    assert len(lines) == 2
    assert number(lines[0], "epsilon") == number(lines[1], "epsilon")


@pytest.mark.parametrize("sigma", ["1e200", "1e160", "1e-200"])
def test_noise_out_of_all_range_ends_in_a_sentence(sigma, capsys):
    assert account.main(["--noise-multiplier", sigma, "--num-steps", "10"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
