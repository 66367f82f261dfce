"""Privacy bugs that are planted on purpose: the named test fails for each of them.

Without planting any, the quick tests check that the list still fits the sources and the tests.
"""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS
from tests.mutants.render import PAGE, table, table_of

ROOT = Path(__file__).parent.parent.parent
SERVER = Path(__file__).with_name("server.py")
NOT_A_KILL = {"ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError"}
NOT_A_KILL |= {"NameError", "UnboundLocalError", "AttributeError", "TypeError"}
"""What a planted bug that is no sound Python raises; a test that sees it has found nothing."""


def run(jobs: list[dict]) -> list[list[dict]]:
    """The results of ``server.py``, one list for each job."""
    done = subprocess.run(
        [sys.executable, SERVER], input=json.dumps(jobs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def job(mutant) -> dict:
    return {"tests": [mutant.test], "edit": [mutant.file, mutant.old, mutant.new]}


def survives(results: list[dict]) -> str | None:
    """Why these results of the named test are no kill; None if they are one."""
    last = results[-1]
    if last["outcome"] != "failed":
        return f"{last['outcome']} {last['error']} {last['message']}"
    if last["error"] in NOT_A_KILL:
        return f"a {last['error']}, so the mutant is no sound program: {last['message']}"
    return None


@pytest.mark.slow
def test_every_planted_bug_is_found_by_its_test():
    """And the same test passes without the bug, in the same surroundings."""
    by_file: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        by_file.setdefault(mutant.test.split("::")[0], set()).add(mutant.test)
    sound = [{"tests": sorted(tests), "edit": None} for tests in by_file.values()]
    results = run([*sound, *map(job, MUTANTS)])
    unsound = [r for file in results[: len(sound)] for r in file if r["outcome"] != "passed"]
    assert not unsound
    passed = {r["test"] for file in results[: len(sound)] for r in file}
    functions = {test.split("[")[0] for test in passed}
    assert all(m.test in passed or m.test in functions for m in MUTANTS)
    found = zip(MUTANTS, results[len(sound) :], strict=True)
    survivors = {mutant.name: why for mutant, of in found if (why := survives(of))}
    assert not survivors


@pytest.mark.slow
def test_what_is_no_kill_is_told_from_one():
    """A test that passes, one that is not there, and a mutant that is no program."""
    test = "tests/mechanism/test_noise.py::test_the_sum_itself_is_not_changed"
    edit = ["dpengine/mechanism/noise.py", "released = torch.empty_like(values)"]
    jobs = [
        {"tests": [test], "edit": None},
        {"tests": [test], "edit": [*edit, "released = values"]},
        {"tests": [test], "edit": [*edit, "released = torch.empty_like(values), 1"]},
        {"tests": [test], "edit": [*edit, "released = (torch.empty_like(values)"]},
        {"tests": [test + "_at_all"], "edit": [*edit, "released = values"]},
    ]
    why = [survives(results) for results in run(jobs)]
    assert why[0].startswith("passed")
    assert why[1] is None
    assert why[2].startswith("a AttributeError")
    assert why[3].startswith("broken") and why[4].startswith("broken")


def test_there_are_enough_and_each_has_a_name_of_its_own():
    names = Counter(mutant.name for mutant in MUTANTS)
    assert len(MUTANTS) >= 45 and max(names.values()) == 1


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_edit_fits_its_file_at_one_place(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    for mutant in MUTANTS:
        if mutant.file == file:
            assert source.count(mutant.old) == 1, mutant.name
            ast.parse(source.replace(mutant.old, mutant.new))
            assert mutant.old != mutant.new


def test_every_named_test_exists():
    files = {mutant.test.split("::")[0] for mutant in MUTANTS}
    functions = {
        f"{file}::{node.name}"
        for file in files
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {mutant.test.split("[")[0] for mutant in MUTANTS} <= functions


def test_the_documentation_shows_the_list():
    """Else run `python -m tests.mutants.render`."""
    assert table_of(PAGE.read_text(encoding="utf-8")) == table()
