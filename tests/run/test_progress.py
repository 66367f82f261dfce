"""The progress bar shows a bound of what was spent, at every step."""

import io
import re
import sys
import time

import pytest

from dpengine import accounting, finetune
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run.ledger import Ledger
from dpengine.run.progress import percent, progress_bar


def plan(**changes) -> PrivacyPlan:
    fields = {
        "sampling_rate": 1.0,
        "noise_multiplier": 20.0,
        "num_steps": 50,
        "max_grad_norm": 1.0,
        "delta": 1e-5,
        "public_dataset_size": 1000,
        "adjacency": "zero-out",
        "draws_per_record": 4,
        "trainable_parameters": 100,
    }
    return PrivacyPlan(**(fields | changes))


def test_epsilon_is_never_less_than_what_was_spent(tmp_path, capsys):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan())
    with progress_bar(ledger) as progress:
        for step in range(1, 51):
            ledger.reserve()
            progress.advance()
            shown = re.findall(r"epsilon <= ([0-9.]+[0-9])", progress._bar.postfix)
            assert float(shown[-1]) >= accounting.plan_epsilon(plan(), step).estimate
    capsys.readouterr()


def test_draws_per_second_come_from_the_plan(tmp_path, monkeypatch, capsys):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan(sampling_rate=0.5, num_steps=2))
    with progress_bar(ledger) as progress:
        ledger.reserve()
        progress.advance()
        elapsed = progress._bar.format_dict["elapsed"]
        rate = float(progress._bar.postfix.split(" draws/s")[0].replace(",", ""))
    assert rate == pytest.approx(0.5 * 1000 * 4 / elapsed, rel=0.5)
    capsys.readouterr()


def test_a_share_is_shown_where_it_was_asked_for(tmp_path, capsys):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan())
    with progress_bar(ledger) as progress:
        ledger.reserve()
        progress.advance(0.537)
        assert progress._bar.postfix.endswith(", about 54% within the bound")
        progress.advance(None)
        assert "bound" not in progress._bar.postfix
    capsys.readouterr()


def test_a_run_without_noise_says_so(tmp_path, capsys):
    ledger = Ledger.create(tmp_path / "ledger.jsonl", plan(noise_multiplier=0.0))
    with progress_bar(ledger) as progress:
        ledger.reserve()
        progress.advance()
        assert "not private" in progress._bar.postfix
    capsys.readouterr()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_over_private_records_shows_no_count(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in percent(range(37), "Encoding"):
        time.sleep(0.01)
    shown = sys.stderr.getvalue()
    assert re.search(r"Encoding: +\d+%", shown)
    assert not re.search(r"37|\d/\d|it/s|\d\d:\d\d", shown.replace("37%", ""))


def test_a_bar_is_for_terminals_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(percent(range(5), "Encoding")) == list(range(5))
    assert sys.stderr.getvalue() == ""


def test_every_phase_of_a_run_is_named_before_it_begins(arguments, capsys):
    assert finetune.main(arguments) == 0
    out = capsys.readouterr().out
    phases = [
        "Loading the base model and the images ...",
        "Checking the gradients of each record ...",
        "Calibrating the noise to the budget ...",
        "Drawing 40 images and the preview ...",
    ]
    places = [out.index(phase) for phase in phases]
    assert places == sorted(places)
