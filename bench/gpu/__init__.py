"""Everything that needs a GPU, in one call: python -m bench.gpu --out DIR --minutes 8

Checks every kernel on the device, times every op beside eager PyTorch and Opacus' formulas, adds up
what privacy costs in a training step, and tries other block sizes. Each section runs in a process
of its own, so that one that crashes or hangs takes nothing with it. Writes DIR/gpu.json as it goes;
what failed and what there was no time for stands in it. Needs torch and triton; diffusers for the
UNet of the step, dpengine and peft for whole steps, pytest for the kernels' tests.
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

from .. import cases, layers
from ..shapes import LAYERS, MODELS, SMALL, Shape
from . import timing
from .tuning import tune

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = ("lora_side_b", "lora_side_a", "lora_forward")


class Report:
    """Results as they come; each entry is tried, and its failure is a result too."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.deadline = path, time.monotonic() + seconds
        self.content: dict[str, Any] = {"errors": [], "left_out": 0}

    def add(self, section: str, entry: dict[str, Any], measure: Callable[[], dict]) -> None:
        """Append ``entry`` with what ``measure`` returns to ``section``, if there is time."""
        if time.monotonic() > self.deadline:
            self.content["left_out"] += 1
        else:
            try:
                self.content.setdefault(section, []).append(entry | measure())
            except Exception as error:
                text = "".join(traceback.format_exception(error))[-3000:]
                self.content["errors"].append({"section": section, **entry, "error": text})
        write(self.path, self.content)


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, so that a reader never finds half of it."""
    partial_file = path.with_suffix(".part")
    partial_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial_file.replace(path)


def device(commit: str) -> dict[str, Any]:
    """What ran, and on what."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = str(torch.version.hip)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def add_checks(report: Report, dtype: str, strided: bool) -> None:
    """Every op on every small shape, against float64."""
    for op, (name, shape) in product(cases.OPS, SMALL.items()):
        entry = {"op": op, "shape": name, "dtype": dtype, "strided": strided}
        report.add("checks", entry, partial(_check, op, shape, DTYPES[dtype], strided))


def _check(op: str, shape: Shape, dtype: torch.dtype, strided: bool) -> dict[str, list[str]]:
    inputs = cases.make_inputs(shape, dtype, timing.DEVICE, strided=strided)
    return {"problems": cases.check(op, inputs)}


def add_step(report: Report) -> None:
    """Noise, slab and all per-record work of a step of SD 1.5."""
    report.add("noise", {"values": timing.N_VALUES}, timing.measure_noise)
    for op, impl in product(("clip_and_sum", "sq_norms"), layers.IMPLS):
        entry = {"op": op, "impl": impl, "records": 16}
        report.add("slab", entry, partial(timing.measure_slab, op, impl, 16))
    step = {"model": "sd15_512", "batch": 16}
    report.add("step", step, partial(timing.measure_step, 16))
    report.add("unet", step, partial(timing.measure_unet, 16))


def add_engine(report: Report) -> None:
    """Whole training steps, non-private, ours and Opacus', and the largest batch of each."""
    try:
        from .. import training
    except ImportError as missing:
        reason = f"it needs dpengine, diffusers and peft: {missing}"
        return report.add("skipped", {"section": "engine", "reason": reason}, dict)
    for model, (impl, how) in product(
        training.models(timing.DEVICE), training.impls(timing.DEVICE)
    ):
        entry = {"model": model, "impl": impl, "how": how}
        measure = partial(training.measure_step, model, impl, how, timing.DEVICE)
        report.add("engine", entry, measure)
    for model, impl in product(training.models(timing.DEVICE), training.installed()):
        entry = {"model": model, "impl": impl}
        measure = partial(training.largest_batch, model, impl, timing.DEVICE)
        report.add("largest_batch", entry, measure)


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
        measure = partial(tune, op, shape, torch.bfloat16, report.deadline)
        report.add("tuning", {"op": op, "layer": layer, **asdict(shape)}, measure)


def add_tests(report: Report) -> None:
    """The kernels' own tests, where pytest is there."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-o", "filterwarnings="]
    command += ["--deselect", "tests/kernels/test_compile.py"]

    def run() -> dict[str, Any]:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if result.returncode:
            raise RuntimeError(result.stdout[-2500:] + result.stderr[-500:])
        return {"output": result.stdout[-300:]}

    report.add("tests", {"command": command[2:]}, run)


OTHER_OPS = tuple(op for op in layers.USED if op not in OPS)
SECTIONS: dict[str, tuple[float, Callable[[Report], None]]] = {
    "checks_bfloat16": (0.15, lambda r: add_checks(r, "bfloat16", False)),
    "step": (0.15, add_step),
    "engine": (0.25, add_engine),
    "ops": (0.25, lambda r: add_ops(r, OPS, rank=4, draws=1)),
    "other_ops": (0.25, lambda r: add_ops(r, OTHER_OPS, rank=4, draws=1)),
    "tests": (0.4, add_tests),
    "tuning": (0.4, add_tuning),
    "ranks": (0.4, lambda r: [add_ops(r, OPS, *p) for p in ((16, 1), (4, 4), (16, 4))]),
    "checks_float32": (0.5, lambda r: add_checks(r, "float32", True)),
    "checks_float16": (1.0, lambda r: add_checks(r, "float16", True)),
}
"""What runs, in this order, and the most of the time still left that it may take."""


def table(content: dict[str, Any]) -> str:
    """The short table that goes last."""
    checks = content.get("checks", [])
    wrong = [entry for entry in checks if entry["problems"]]
    lines = [
        f"{content['device']['name']}: {len(checks)} checks, {len(wrong)} wrong, "
        f"{len(content['errors'])} errors, {content['left_out']} entries left out"
    ]
    lines += [str(entry["problems"]) for entry in wrong[:5]]
    lines += [str(entry["error"]).strip().splitlines()[-1] for entry in content["errors"][:5]]
    for entry in [*content.get("noise", []), *content.get("step", []), *content.get("unet", [])]:
        lines.append("  ".join(f"{k} {v:.4g}" for k, v in entry.items() if isinstance(v, float)))
    for entry in content.get("skipped", []):
        lines.append(f"skipped {entry['section']}: {entry['reason']}")
    for entry in content.get("engine", []):
        lines.append(
            f"{entry['model']:10}{entry['impl']:13}{entry['how']:11}{entry['ms']:9.1f} ms"
            f"{entry['images_per_s']:9.1f} images/s{entry['peak_gib']:7.1f} GiB"
        )
    for entry in content.get("largest_batch", []):
        lines.append(f"{entry['model']:10}{entry['impl']:13}batch {entry['largest_batch']}")
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


def run_section(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The results of one section, measured in a process of its own."""
    path = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.gpu", "--out", str(folder), "--section", name]
    command += ["--minutes", str(seconds / 60)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=seconds + 20
        )
        failure = result.stderr[-1500:] if result.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"still ran after {seconds + 20:.0f} s"
    content = json.loads(path.read_text()) if path.exists() else {"errors": [], "left_out": 0}
    if failure:
        content["errors"].append({"section": name, "error": failure})
    path.unlink(missing_ok=True)
    return content


def merge(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the results of a section to those of the others."""
    for key, value in part.items():
        total[key] = total.get(key, 0 if isinstance(value, int) else []) + value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=8, help="how long it may take in all")
    parser.add_argument("--commit", help="what is measured; asked of git where it is not given")
    parser.add_argument("--section", choices=SECTIONS, help="run this one alone, in this process")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a GPU, and torch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    if arguments.section:
        path = arguments.out / f"{arguments.section}.json"
        SECTIONS[arguments.section][1](Report(path, end - time.monotonic()))
        return
    git = ["git", "rev-parse", "HEAD"]
    commit = arguments.commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    if not commit:
        sys.exit("bench.gpu found no commit to name; give --commit")
    content: dict[str, Any] = {"device": device(commit), "errors": [], "left_out": 0}
    for name, (share, _) in SECTIONS.items():
        seconds = share * (end - time.monotonic() - 20)
        if seconds > 5:
            merge(content, run_section(name, arguments.out, seconds))
        else:
            content["errors"].append({"section": name, "error": "no time was left"})
        write(arguments.out / "gpu.json", content)
    print(table(content))
