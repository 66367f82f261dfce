"""Everything that needs a GPU, in one call: python -m bench.gpu --out DIR --minutes 8

Checks every kernel on the device, times every op beside eager PyTorch and Opacus' formulas, adds up
what privacy costs in a training step, and tries other block sizes. Writes DIR/gpu.json, also when
something fails or time runs out: what went wrong stands in the file. Needs torch and triton;
diffusers only for the step.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from . import cases, layers, timing
from .shapes import LAYERS, MODELS, SMALL, Shape
from .tuning import tune

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = ("lora_side_b", "lora_side_a", "lora_forward")


class Report:
    """Results as they come; each entry is tried, and its failure is a result too."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.content: dict[str, Any] = {"device": _device(), "errors": []}

    def add(self, section: str, entry: dict[str, Any], measure: Callable[[], dict]) -> None:
        """Append ``entry`` with what ``measure`` returns to ``section``, if there is time."""
        if time.monotonic() > self.deadline:
            self.content["errors"].append({"section": section, **entry, "error": "out of time"})
            return
        try:
            self.content.setdefault(section, []).append(entry | measure())
        except Exception as error:
            text = "".join(traceback.format_exception(error))[-1500:]
            self.content["errors"].append({"section": section, **entry, "error": text})
        self.path.write_text(json.dumps(self.content, indent=1, default=str), encoding="utf-8")


def _device() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    properties = torch.cuda.get_device_properties(0)
    query = ("--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader")
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "nvidia-smi": output("nvidia-smi", *query),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
    }


def measure_all(report: Report) -> None:
    """What the goals are about first, then the rest while there is time."""
    for dtype, strided in ((torch.bfloat16, False), (torch.float32, True)):
        add_checks(report, dtype, strided)
    report.add("noise", {"values": timing.N_VALUES}, timing.measure_noise)
    for op, impl in product(("clip_and_sum", "sq_norms"), layers.IMPLS):
        entry = {"op": op, "impl": impl, "records": 16}
        report.add("slab", entry, partial(timing.measure_slab, op, impl, 16))
    step = {"model": "sd15_512", "batch": 16}
    report.add("step", step, partial(timing.measure_step, 16))
    add_ops(report, OPS, rank=4, draws=1)
    add_tuning(report)
    for rank, draws in ((16, 1), (4, 4), (16, 4)):
        add_ops(report, OPS, rank, draws)
    add_ops(report, [op for op in layers.USED if op not in OPS], rank=4, draws=1)
    add_tests(report)
    for dtype, strided in product(DTYPES, (False, True)):
        add_checks(report, dtype, strided)


def add_checks(report: Report, dtype: torch.dtype, strided: bool) -> None:
    """Every op on every small shape, against float64."""
    for op, (name, shape) in product(cases.OPS, SMALL.items()):
        entry = {"op": op, "shape": name, "dtype": dtype, "strided": strided}
        report.add("checks", entry, partial(_check, op, shape, dtype, strided))


def _check(op: str, shape: Shape, dtype: torch.dtype, strided: bool) -> dict[str, list[str]]:
    inputs = cases.make_inputs(shape, dtype, timing.DEVICE, strided=strided)
    return {"problems": cases.check(op, inputs)}


def add_ops(report: Report, names: Iterable[str], rank: int, draws: int) -> None:
    """Ops at every layer of every model, 16 rows in all, beside eager PyTorch and Opacus."""
    for model, op in product(MODELS, names):
        for layer, impl in product(MODELS[model], layers.IMPLS):
            shape = LAYERS[layer]
            n_records = max(1, shape.n_records // draws)
            shape = replace(shape, rank=rank, draws=draws, n_records=n_records)
            if layers.applies(op, shape):
                entry = {"model": model, "layer": layer, "op": op, "impl": impl, **asdict(shape)}
                measure = partial(timing.measure_op, op, impl, shape, torch.bfloat16)
                report.add("ops", entry, measure)


def add_tuning(report: Report) -> None:
    """Other block sizes for the layers of SD 1.5 with the most tokens."""
    for op, layer, rank in product(OPS, list(MODELS["sd15_512"])[:3], (4, 16)):
        shape = replace(LAYERS[layer], rank=rank)
        measure = partial(tune, op, shape, torch.bfloat16)
        report.add("tuning", {"op": op, "layer": layer, **asdict(shape)}, measure)


def add_tests(report: Report) -> None:
    """The kernels' own tests, where pytest and what they import are there."""
    command = [sys.executable, "-m", "pytest", "tests/kernels/test_triton.py", "-q"]

    def run() -> dict[str, Any]:
        seconds = max(1.0, report.deadline - time.monotonic())
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return {"status": result.returncode, "output": result.stdout[-2000:]}

    report.add("tests", {"command": command[2:]}, run)


def table(content: dict[str, Any]) -> str:
    """The short table that goes last."""
    checks = content.get("checks", [])
    wrong = [entry for entry in checks if entry["problems"]]
    lines = [
        f"{content['device']['name']}: {len(checks)} checks, {len(wrong)} wrong, "
        f"{len(content['errors'])} errors"
    ]
    lines += [str(entry["problems"]) for entry in wrong[:5]]
    lines += [str(entry["error"]).strip().splitlines()[-1] for entry in content["errors"][:5]]
    for entry in content.get("noise", []) + content.get("step", []):
        lines.append("  ".join(f"{k} {v:.4g}" for k, v in entry.items() if isinstance(v, float)))
    for entry in content.get("slab", []):
        lines.append(f"{entry['op']:14}{entry['impl']:8}{entry['us']:9.1f} us")
    for entry in content.get("ops", []):
        if entry["model"] == "sd15_512" and entry["rank"] == 4 and entry["draws"] == 1:
            lines.append(
                f"{entry['op']:27}{entry['impl']:8}{entry['layer']:15}{entry['us']:9.1f} us  "
                f"{entry['share_of_copy']:.2f} of copy"
            )
    for entry in content.get("tuning", []):
        lines.append(
            f"tuned {entry['op']:14}{entry['layer']:15} r{entry['rank']:<4}"
            f"{entry['default_us']:8.1f} -> {entry['best_us']:8.1f} us  {entry['best']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=8, help="stop measuring after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a GPU, and torch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / "gpu.json", 60 * arguments.minutes)
    measure_all(report)
    print(table(report.content))


if __name__ == "__main__":
    main()
