"""Where measurements are kept: one JSON file for a suite, a device and a day.

`results/SUITE-DEVICE-DATE.json`, such as `steps-cpu-2-cores-2026-11-24.json`, and with `--full`
`steps-full-cpu-2-cores-2026-11-24.json`.
"""

import json
import os
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "peft",
    "opacus",
    "numpy",
    "prv-accountant",
    "dp-accounting",
)


def device_name() -> str:
    """What the suites run on: the GPU where there is one, else the number of cores."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        name = f"cpu {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance() -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "device": device_name(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write(suite: str, content: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write what a suite measured, with its provenance, at once; the file that now holds it."""
    about = provenance()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{suite}-full" if content.get("full") else suite
    file = folder / f"{name}-{about['device']}-{about['date']}.json"
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(about | content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)
    return file


def newest(suite: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The newest results of a suite, by device; of one day those with ``--full``."""
    found = [json.loads(file.read_text()) for file in folder.glob(f"{suite}-*.json")]
    found.sort(key=lambda entry: (entry["date"], entry.get("full", False)))
    return {entry["device"]: entry for entry in found}


def commit() -> str:
    """The commit that is checked out, `-dirty` where code differs from it: results are no code."""

    def git(*command: str) -> str:
        run = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _processor() -> str:
    """The model of the CPU where the system tells it, else its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
