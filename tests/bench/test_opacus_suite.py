"""Opacus' suite on dpengine: how its tests are edited, and how what becomes of them is sorted."""

import re

import pytest

from bench import opacus_suite
from bench.opacus_differences import DIFFERENCES, difference

THEIRS = """\
from opacus import PrivacyEngine
from opacus.data_loader import (
    CollateFnWithEmpty,
    DPDataLoader,
)
from opacus.optimizers import DPOptimizer
from opacus.layers import DPLSTM


class One:
    def test(self):
        from opacus.layers import DPGRU
        assert self.model._module.fc


class Two:
    def test(self):
        assert GradSampleModule(x)._module.fc
"""


def test_imports_are_those_that_the_page_names_and_no_line_moves():
    changed = opacus_suite.rewritten(THEIRS)
    lines = changed.splitlines()
    assert lines[0] == "from dpengine import PrivacyEngine"
    assert lines[1] == (
        "from dpengine import DPDataLoader; from opacus.data_loader import CollateFnWithEmpty"
    )
    assert lines[2:5] == [""] * 3 and lines[5] == "from dpengine import DPOptimizer"
    assert lines[6:11] == THEIRS.splitlines()[6:11] and len(lines) == len(THEIRS.splitlines())
    assert "self.model.fc" in changed and "GradSampleModule(x)._module.fc" in changed


def test_only_files_that_then_use_something_of_ours_are_run(tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "grad_samples").mkdir(parents=True)
    (theirs / "engine_test.py").write_text("from opacus import PrivacyEngine\n")
    of_theirs = "from opacus.accountants import RDPAccountant\nx._module\n"
    (theirs / "accountants_test.py").write_text(of_theirs)
    (theirs / "grad_samples" / "common.py").write_text("from opacus.x import y\n")
    (theirs / "grad_samples" / "linear_test.py").write_text("from .common import Z\n")
    used = opacus_suite.prepare(theirs, tmp_path / "ours")
    assert {file.name for file in used} == {"engine_test.py", "linear_test.py"}
    assert (tmp_path / "ours" / "accountants_test.py").read_text() == of_theirs
    assert "opacus" in (theirs / "engine_test.py").read_text()


def lines(*tests) -> list[dict]:
    return [{"test": f"x::{n}", "outcome": o, "text": text} for n, (o, text) in enumerate(tests)]


def test_outcomes_are_sorted_into_three_kinds_and_gaps_are_named():
    refused = "E  ValueError: batch_first must be True: let the first axis"
    unsatisfied = "E  hypothesis.errors.Unsatisfiable: Unable to satisfy assumptions"
    results = {
        "a_test.py": lines(
            ("passed", ""), ("failed", refused), ("failed", "E  AssertionError: 1 != 2")
        ),
        "b_test.py": [
            {"example": "equal"},
            {"example": "refused", "reason": "BatchNorm is refused"},
            *lines(("failed", unsatisfied), ("skipped", "")),
        ],
    }
    text, gaps = opacus_suite.tables(results)
    assert "| `a_test.py` | 1 | 1 | 1 | 0 |" in text and "| `b_test.py` | 0 | 1 | 0 | 1 |" in text
    assert "| `all` | 1 | 2 | 1 | 1 |" in text and "1 equal, 0 different, 1 refused" in text
    assert gaps == ["x::2: E  AssertionError: 1 != 2"]
    assert "| BatchNorm is refused | 1 |" in text


@pytest.mark.parametrize(
    "text",
    [
        "AssertionError: A total of 1 values do not match for loss_reduction=mean",
        "AssertionError: A total of 1 shapes do not match for loss_reduction=mean",
        "AssertionError: Tensor-likes are not close!",
        "AssertionError: 8.1 != 7.9 : epsilon",
        "TypeError: unsupported operand",
    ],
)
def test_wrong_values_are_a_gap_whatever_the_test(text):
    for _, of, _ in DIFFERENCES:
        assert difference(of.strip("$"), [text]) is None


def test_the_page_has_the_table_and_names_its_differences():
    page = opacus_suite.PAGE.read_text(encoding="utf-8")
    block = page.split(opacus_suite.BEGIN)[1].split(opacus_suite.END)[0]
    assert re.search(r"\| `all` \| \d+ \| \d+ \| \d+ \| \d+ \|", block)
    assert re.search(r"Examples of their oracle: \d+ equal, 0 different", block)
    reasons = re.findall(r"(?m)^\| ([^|]+) \| \d+ \|$", block)
    assert reasons and set(reasons) <= {reason for reason, _, _ in DIFFERENCES}


def test_a_test_with_one_failure_that_is_not_documented_is_a_gap():
    assert difference("x", ["batch_first must be True"]) is not None
    assert difference("x", ["batch_first must be True", "AssertionError: 1 != 2"]) is None
