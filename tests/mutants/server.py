"""Runs tests against mutated copies of the tree, each in a fork of one process that knows torch.

    python tests/mutants/server.py < jobs.json > results.json

A job is {"tests": [node ids], "edit": null or [file, old, new]}. Its result is a list of the tests
that ran, {"test", "outcome", "error", "message", "seconds"}. The outcome is `passed`, `failed` (by
an exception in the test itself) or `broken` (not collected, no fixture, skipped, or too slow). The
checkout is not touched: each job has a copy of it, which `dpengine` is imported from.
"""

import gc
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {"dpengine": "dpengine", "dpengine.kernels": "kernels", "dpengine.models": "models"}
PARALLEL = 2
SECONDS = 120
"""A job that takes longer is broken: a mutant must not hang the suite."""

_TREES = ("dpengine", "kernels", "models", "bench", "tests")
_FILES = ("pyproject.toml",)
_PRELOADED = (
    "numpy",
    "torch",
    "scipy.stats",
    "scipy.optimize",
    "peft",
    "diffusers",
    "diffusers.optimization",
    "hypothesis",
    "opacus",
    "opacus.optimizers",
    "accelerate",
    "prv_accountant",
    "safetensors.torch",
    "cryptography.hazmat.primitives.ciphers",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch.utils.data",
    "triton.language",
    "tqdm",
    "PIL.Image",
)


def main() -> None:
    """Read jobs, print their results in the same order."""
    jobs = json.load(sys.stdin)
    output = os.dup(1)
    os.dup2(2, 1)  # what tests print is no result
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        results = _run_all(jobs, Path(folder))
    os.write(output, json.dumps(results).encode())


def _preload() -> None:
    import pytest

    for name in _PRELOADED:
        __import__(name)
    with tempfile.TemporaryDirectory() as folder:  # its own modules, which it imports when it runs
        pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", os.devnull, folder])
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each child walks, and so copies, all of it
    assert not any(name.split(".")[0] == "dpengine" for name in sys.modules)


def _run_all(jobs: list[dict], folder: Path) -> list:
    base = folder / "base"
    for name in _TREES:
        shutil.copytree(ROOT / name, base / name)
    for name in _FILES:
        shutil.copy2(ROOT / name, base / name)
    waiting, running = list(enumerate(jobs)), {}
    results: list = [None] * len(jobs)
    while waiting or running:
        while waiting and len(running) < PARALLEL:
            number, job = waiting.pop(0)
            tree = _tree(base, folder / str(number), job["edit"])
            running[_fork(tree, job)] = number, tree
        pid, _ = os.wait()
        number, tree = running.pop(pid)
        found = tree / "result.json"
        broken = {"outcome": "broken", "error": "died", "message": _tail(tree), "seconds": 0.0}
        results[number] = (
            json.loads(found.read_text())
            if found.exists()
            else [{"test": test, **broken} for test in jobs[number]["tests"]]
        )
        shutil.rmtree(tree)
    return results


def _tree(base: Path, tree: Path, edit: list[str] | None) -> Path:
    """A copy of ``base`` by hard links, in which one file differs."""
    shutil.copytree(base, tree, copy_function=os.link)
    if edit is not None:
        name, old, new = edit
        file = tree / name
        source = file.read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}"
        file.unlink()  # the other trees keep theirs
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            compiled.unlink()
        file.write_text(source.replace(old, new), encoding="utf-8")
    return tree


def _fork(tree: Path, job: dict) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            _child(tree, job)
        finally:
            os._exit(0)
    return pid


def _child(tree: Path, job: dict) -> None:
    os.chdir(tree)
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    sys.meta_path.insert(0, _FromTree(tree))
    import pytest

    recorder = _Recorder()
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tree / "basetemp")]
    options += ["-x"] * (job["edit"] is not None) + ["--rootdir", str(tree)]
    pytest.main([*options, "-c", str(tree / "pyproject.toml"), *job["tests"]], plugins=[recorder])
    if not recorder.results:
        recorder.results = [
            {"test": test, "outcome": "broken", "error": "not run", "message": _tail(tree)}
            for test in job["tests"]
        ]
    temporary = tree / "result.tmp"
    temporary.write_text(json.dumps(recorder.results))
    temporary.rename(tree / "result.json")


class _FromTree:
    """Finds this project's packages in ``tree``, before an installed or editable one is found."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name not in PACKAGES:
            return None
        folder = str(self._tree / PACKAGES[name])
        return importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder]
        )


class _Recorder:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.results: list[dict] = []

    def pytest_runtest_makereport(self, item: object, call: object) -> None:
        if call.when == "call":
            outcome = "passed"
        elif call.excinfo is None:
            return
        else:
            outcome = "broken"
        error = message = ""
        if call.excinfo is not None:
            error, message = call.excinfo.typename, str(call.excinfo.value)[:300]
            outcome = "broken" if outcome == "broken" or error == "Skipped" else "failed"
        self.results.append(
            {
                "test": item.nodeid,
                "outcome": outcome,
                "error": error,
                "message": message,
                "seconds": round(call.duration, 3),
            }
        )


def _tail(tree: Path) -> str:
    log = tree / "output.txt"
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)
