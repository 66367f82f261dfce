"""What is kept of a session of benchmarks: whole suites, and nothing of a part of one."""

import json

import pytest

from bench import results

pytest_plugins = ["pytester"]
ROOT = results.ROOT  # torch is imported with it, once and not in every session

SUITE = """
import pytest

@pytest.mark.parametrize("name", ["a", "b"])
def test_question(answer, benchmark, name):
    benchmark.pedantic(int, rounds=3)
    answer("found", {"name": name}, name)

def test_last(answer, benchmark):
    benchmark.pedantic(int, rounds=1)
    %s
    answer("found", {"name": "last"}, "last")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """``run(*options, last=...)`` runs a suite of three tests; its exit status and what it kept."""
    # Other plugins take a second to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_benchmark.plugin")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a session of its own, not a worker's
    # Its own plugins and settings; this project's stay out.
    pytester.makeconftest("from bench.conftest import *")
    pytester.makeini("[pytest]\npythonpath = " + str(ROOT))

    def session(*options, last=""):
        pytester.makepyfile(test_toy=SUITE % (last or "pass"))
        kept = pytester.path / "kept"
        found = pytester.inline_run("--results", str(kept), *options, no_reraise_ctrlc=True)
        files = list(kept.glob("toy-*.json"))
        content = [json.loads(file.read_text()) for file in files]
        assert all(0 < c["seconds"] < 60 for c in content)
        return found.ret, [entry["name"] for c in content for entry in c["results"]["found"]]

    return session


def test_a_whole_suite_is_kept(run):
    assert run("--benchmark-only") == (0, ["a", "b", "last"])


@pytest.mark.parametrize(
    "options",
    [("-k", "last"), ("test_toy.py::test_last",), ("--benchmark-disable",), ("--benchmark-skip",)],
    ids=" ".join,
)
def test_a_choice_of_tests_is_not(run, options):
    assert run(*options) == (0, [])


@pytest.mark.parametrize(
    "last",
    ["assert False", "raise KeyboardInterrupt", "pytest.exit('enough')", "pytest.skip('none')"],
)
def test_a_session_that_did_not_end_well_is_not(run, last):
    assert run(last=last)[1] == []


def test_what_failed_before_is_not_kept_alone(run):
    assert run(last="assert False")[1] == []
    assert run("--lf") == (0, [])
