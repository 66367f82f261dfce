"""One question is one test: its peers take turns in it, and its answer goes to `results/`.

`--full` measures more sizes and whole jobs. A suite's file is written when all of its tests ran and
passed in one session: a choice of tests, a failure, Ctrl-C, and tests that are not timed leave the
last one as it was.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import results

_ENTRIES = pytest.StashKey[dict[str, dict[str, list]]]()
_LINES = pytest.StashKey[list[str]]()
_LEFT = pytest.StashKey[Counter[str]]()
"""Tests of each suite that have not passed yet."""
_SECONDS = pytest.StashKey[Counter[str]]()
"""What the tests of each suite took, with what they set up."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpengine benchmarks")
    group.addoption("--full", action="store_true", help="more sizes and whole jobs: hours")
    group.addoption("--results", type=Path, default=results.FOLDER, help="folder for the JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ENTRIES] = defaultdict(lambda: defaultdict(list))
    config.stash[_LINES] = []
    config.stash[_LEFT] = Counter()
    config.stash[_SECONDS] = Counter()


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to take the time for more sizes."""
    return request.config.getoption("--full")


@pytest.fixture
def answer(request: pytest.FixtureRequest, benchmark) -> Callable[[str, dict[str, Any], str], None]:
    """``answer(section, entry, line)``: keep an entry for the JSON and a line for the terminal.

    With ``benchmark``, or `--benchmark-only` would skip the tests that time by themselves.
    """
    suite = _suite(request.node.nodeid)

    def keep(section: str, entry: dict[str, Any], line: str) -> None:
        request.config.stash[_ENTRIES][suite][section].append(entry)
        request.config.stash[_LINES].append(f"{section:12} {line}")

    return keep


@pytest.fixture(autouse=True)
def quiet_peers() -> Iterator[None]:
    """Opacus warns of its hooks and of its generator, which is not secure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.hookimpl(tryfirst=True)  # before some are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_LEFT] += Counter(_suite(item.nodeid) for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    item.config.stash[_SECONDS][_suite(item.nodeid)] += call.duration
    if call.when == "call" and report.passed:
        item.config.stash[_LEFT][_suite(item.nodeid)] -= 1
    return report


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    if not config.stash[_LINES]:
        return
    terminalreporter.section("answers")
    for line in config.stash[_LINES]:
        terminalreporter.write_line(line)
    for suite, entries in config.stash[_ENTRIES].items():
        if _is_a_choice(config) or config.stash[_LEFT][suite]:
            terminalreporter.write_line(f"{suite}: not all of its tests ran and passed, not kept")
            continue
        content = {
            "full": config.getoption("--full"),
            "seconds": config.stash[_SECONDS][suite],
            "results": dict(entries),
        }
        file = results.write(suite, content, config.getoption("--results"))
        terminalreporter.write_line(f"{suite}: written to {file}")


def _is_a_choice(config: pytest.Config) -> bool:
    """Whether fewer tests may have been collected than there are, or none is timed."""
    by_name = any("::" in argument for argument in config.args)
    last_failed = getattr(config.option, "lf", False)  # of a plugin that may be left out
    return by_name or last_failed or config.option.benchmark_disable


def _suite(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
