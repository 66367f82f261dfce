"""Opacus' own tests, run on dpengine: what passes, what differs as documented, and what is a gap.

    pip download opacus==1.6.0 --no-binary :all: --no-deps && tar xzf opacus-1.6.0.tar.gz
    python -m bench.opacus_suite opacus-1.6.0/opacus/tests

Changes the imports in a copy of the tests as docs/from-opacus.md says, runs those that then use
something of ours, each in its file's own process, and prints the tables of that page. Their oracle
of per-record gradients compares ours with one backward pass for each record. Needs what their tests
need: torchvision, opt_einsum, hypothesis.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .opacus_differences import difference

ROOT = Path(__file__).parent.parent
MOVED = {"PrivacyEngine", "BatchMemoryManager", "DPDataLoader", "DPOptimizer"}
ORACLE = "per_sample_gradients_utils"
PACKAGE = "suite_of_opacus"
PAGE = ROOT / "docs" / "from-opacus.md"
BEGIN, END = "<!-- begin opacus-suite -->", "<!-- end opacus-suite -->"


def rewritten(source: str) -> str:
    """``source`` edited as docs/from-opacus.md says: imports, and `_module`, the module itself."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or node.col_offset:
            continue
        ours = [alias.name for alias in node.names if alias.name in MOVED]
        if node.module.split(".")[0] != "opacus" or not ours:
            continue
        theirs = [alias.name for alias in node.names if alias.name not in MOVED]
        kept = f"; from {node.module} import {', '.join(theirs)}" if theirs else ""
        lines[node.lineno - 1] = f"from dpengine import {', '.join(ours)}{kept}\n"
        lines[node.lineno : node.end_lineno] = ["\n"] * (node.end_lineno - node.lineno)
    changed = "".join(lines)
    if changed == source:
        return source
    blocks = re.split(r"(?m)^(?=class |def )", changed)
    return "".join(
        block if "GradSampleModule(" in block else block.replace("._module", "") for block in blocks
    )


def prepare(tests: Path, folder: Path) -> list[Path]:
    """A rewritten copy of ``tests`` in ``folder``; the files whose tests use something of ours."""
    shutil.copytree(tests, folder)
    used = []
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        changed = rewritten(source)
        file.write_text(changed, encoding="utf-8")
        by_oracle = ORACLE in source or (
            file.parent.name == "grad_samples" and "from .common import" in source
        )
        if file.name.endswith("_test.py") and (changed != source or by_oracle):
            used.append(file)
    return used


def run(file: Path, log: Path) -> list[dict[str, Any]]:
    """What the tests of ``file``, and their examples, came to: the lines that the oracle wrote."""
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OPACUS_SUITE_LOG": str(log)}
    plugins = ["-p", "no:cacheprovider", "-p", "bench.opacus_oracle"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, str(file)]
    done = subprocess.run(command, cwd=log.parent, env=environment, capture_output=True, text=True)
    if not log.exists():
        raise SystemExit(f"{file.name} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _reason(node: str, failures: list[str], lines: list[dict[str, Any]]) -> str | None:
    """The documented difference behind ``failures``; None for a gap."""
    if len(failures) == 1 and "errors.Unsatisfiable" in failures[0]:
        # Each of its examples was refused: for what, the lines before the test's own tell.
        end = next(i for i, line in enumerate(lines) if line.get("test") == node)
        reasons = []
        for line in reversed(lines[:end]):
            if "test" in line:
                break
            if line["example"] == "refused":
                reasons.append(line["reason"])
        return None if None in reasons else max(reasons, key=reasons.count, default=None)
    return difference(node, failures)


def tables(results: dict[str, list[dict[str, Any]]]) -> tuple[str, list[str]]:
    """The tables of docs/from-opacus.md, in Markdown, and each gap with its failure."""
    rows, reasons, gaps, examples = [], Counter(), [], Counter()
    for name, lines in results.items():
        tests = [line for line in lines if "test" in line]
        examples.update(line["example"] for line in lines if "example" in line)
        kinds: Counter[str] = Counter()
        for node in dict.fromkeys(line["test"] for line in tests):
            mine = [line for line in tests if line["test"] == node]
            failures = [line["text"] for line in mine if line["outcome"] == "failed"]
            reason = _reason(node, failures, lines) if failures else None
            if failures and reason is None:
                gaps.append(f"{node}: {failures[0].strip()[:300]}")
            if reason is not None:
                reasons[reason] += 1
            skipped = all(line["outcome"] == "skipped" for line in mine)
            passed = "skipped" if skipped else "passes"
            kinds["gap" if failures and not reason else "differs" if reason else passed] += 1
        rows.append((name, *(kinds[kind] for kind in ("passes", "differs", "gap", "skipped"))))
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))
    lines = ["| their file | passes | documented difference | gap | skipped |"]
    lines += ["|---|---:|---:|---:|---:|"]
    lines += [
        "| " + " | ".join(f"`{x}`" if i == 0 else str(x) for i, x in enumerate(row)) + " |"
        for row in rows
    ]
    lines += ["", "| documented difference | tests |", "|---|---:|"]
    lines += [f"| {reason} | {n} |" for reason, n in reasons.most_common()]
    lines += [
        "",
        f"Examples of their oracle: {examples['equal']} equal, "
        f"{examples['different']} different, {examples['refused']} refused.",
    ]
    return "\n".join(lines), gaps


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", type=Path, help="the folder opacus/tests of its source archive")
    parser.add_argument("--write", action="store_true", help="into docs/from-opacus.md as well")
    parser.add_argument("--only", default="", help="part of the names of the files to run")
    args = parser.parse_args(arguments)
    if not (args.tests / "grad_samples" / "common.py").exists():
        parser.error(f"{args.tests} must be the folder opacus/tests of Opacus' source archive")
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(args.tests, Path(folder) / PACKAGE)
        results = {
            file.relative_to(Path(folder) / PACKAGE).as_posix(): run(file, Path(folder) / "log")
            for file in files
            if args.only in str(file)
        }
    text, gaps = tables(results)
    print("\n".join([text, "", *gaps]))
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        about = f"Opacus {version('opacus')} on torch {version('torch')}, {date.today()}."
        PAGE.write_text(f"{before}{BEGIN}\n{about}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
