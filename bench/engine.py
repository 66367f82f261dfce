"""What privacy costs in a training step: python -m bench.engine [--compile]

Four measures on a CPU, of stock non-private PEFT, dpengine through its public API, and Opacus'
hooks: operators of a step, time of a step, peak memory, and how cost grows with the draws, the
tokens, the rank and the number of adapters. The goals stand beside the results. Writes
results/engine.json and docs/figures/growth.png.

Times come from steps that take turns in one process, so that whatever else the machine does slows
all alike: read ratios, not milliseconds.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpengine.memory import peak_bytes

from .training import IMPLS, TARGETS, Task, adamw, disagreement, quiet, small, start

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "engine.json"
FIGURE = ROOT / "docs" / "figures" / "growth.png"

OPTIMIZERS = {"AdamW foreach": adamw, "SGD": partial(torch.optim.SGD, lr=1e-3)}
NON_PRIVATE, OURS, OPACUS = IMPLS
COMPILED = "dpengine, compiled"

AGREEMENT = 1e-4
"""Opacus' 1e-6 beside norms of a hundredth at least; see ``training.disagreement``."""


class OpCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches below autograd, without views.

    Every call of an operator is one, a fused or `foreach` one as well; those that a composite
    operator is made of count, itself not. A view returns an alias of an argument that it did not
    write to, by its schema; `_unsafe_view` is one that hides the alias. The profiler's marks around
    an optimizer's step are no operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        hidden_view = func is torch.ops.aten._unsafe_view.default
        if not (is_view or hidden_view or func.namespace == "profiler"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_ops(run: Callable[[], object]) -> int:
    """Operators of ``run()`` that are no views."""
    with OpCounter() as counter:
        run()
    return counter.counts.total()


def _step(
    task: Task, impl: str, optimizer: str, n_records: int, warm_ups: int = 2, **options: Any
) -> Callable[[], None]:
    """A training step on one fixed batch, the optimizer's state made by the first ones."""
    training = start(task, impl, OPTIMIZERS[optimizer], n_records, **options)
    inputs = task.inputs(n_records * options.get("draws", 1))
    for _ in range(warm_ups):
        training.step(*inputs)
    return lambda: training.step(*inputs)


def measure_ops(task: Task, n_records: int) -> list[dict[str, Any]]:
    """Operators of one step: forward, backward, clipping, noise, optimizer, zero_grad."""
    return [
        {
            "optimizer": optimizer,
            "impl": impl,
            "ops": count_ops(_step(task, impl, optimizer, n_records)),
        }
        for optimizer, impl in product(OPTIMIZERS, IMPLS)
    ]


def take_turns(steps: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each step in each round; every round begins with another one."""
    names = list(steps)
    times: dict[Any, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians and of the fastest rounds, and quartiles of the ratios in a round."""
    low, _, high = quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return {
        "of_medians": median(above) / median(below),
        "of_fastest": min(above) / min(below),
        "quartile_1": low,
        "quartile_3": high,
    }


def measure_time(task: Task, n_records: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Times of a step with AdamW beside each other, after a check that both clip alike."""
    apart = disagreement(task, n_records)
    if not apart < AGREEMENT:
        raise AssertionError(f"the clipped update is off from Opacus' by {apart:.1e} of it")
    steps = {impl: _step(task, impl, "AdamW foreach", n_records) for impl in IMPLS}
    if compiled:
        steps[COMPILED] = _step(task, OURS, "AdamW foreach", n_records, how="inductor")
    times = take_turns(steps, rounds)
    ratios = {
        f"{OURS} / {NON_PRIVATE}": ratio(times[OURS], times[NON_PRIVATE]),
        f"{OPACUS} / {OURS}": ratio(times[OPACUS], times[OURS]),
    }
    if compiled:
        ratios[f"{COMPILED} / {NON_PRIVATE}"] = ratio(times[COMPILED], times[NON_PRIVATE])
    return {
        "records": n_records,
        "rounds": rounds,
        "disagreement_with_opacus": apart,
        "median_ms": {impl: 1e3 * median(taken) for impl, taken in times.items()},
        "ratios": ratios,
    }


def measure_memory(
    task_of: Callable[[int], Task], records: Sequence[int], ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """Peak of a step with AdamW above the non-private one's, over 4·N·P bytes.

    The tensors alive at once are counted, so the result is the same on every machine. It says the
    most where the gradients outweigh the activations: at high rank, on small images.
    """
    results = []
    for rank, n_records in product(ranks, records):
        task = task_of(rank)
        params = [p for p in task.make_model().parameters() if p.requires_grad]
        n_params = sum(param.numel() for param in params)
        peaks = {
            impl: peak_bytes(_step(task, impl, "AdamW foreach", n_records), torch.device("cpu"))
            for impl in IMPLS
        }
        slab = 4 * n_records * n_params
        entry = {"records": n_records, "rank": rank, "parameters": n_params, "peak_bytes": peaks}
        above = {impl: (peaks[impl] - peaks[NON_PRIVATE]) / slab for impl in IMPLS[1:]}
        results.append(entry | {"above_non_private": above})
    return results


QUANTITIES: dict[str, tuple[str, Callable[[int], tuple[Task, int]], Sequence[int]]] = {
    "draws": ("draws per record K", lambda k: (small(), k), (1, 2, 4, 8)),
    "tokens": (
        "tokens per image T",
        lambda t: (small(size=round(t**0.5)), 1),
        (64, 256, 400, 576),
    ),
    "rank": ("rank R", lambda r: (small(rank=r), 1), (4, 16, 32, 64)),
    "adapters": (
        "adapted layers",
        lambda n: (small(targets=TARGETS[: n // 7]), 1),
        (7, 14, 21, 28),
    ),
}
"""What is varied: its name on the axis, the task and draws at a value, and the values."""


def measure_growth(
    quantity: str, values: Sequence[int], n_records: int, rounds: int
) -> dict[str, Any]:
    """Time, operators and floating-point operations of a step over the values of a quantity.

    The time is that of the fastest round: other work on the machine can only add to it. Attention
    takes time in T² with and without privacy; what privacy adds shows in the operations above the
    non-private step's. Floating-point operations are of matrix products and convolutions, counted
    from their shapes.
    """
    cases = {value: QUANTITIES[quantity][1](value) for value in values}
    steps = {
        (impl, value): _step(task, impl, "AdamW foreach", n_records, draws=draws)
        for value, (task, draws) in cases.items()
        for impl in (NON_PRIVATE, OURS)
    }
    times = take_turns(steps, rounds)
    result: dict[str, Any] = {"values": list(values), "records": n_records}
    for impl in (NON_PRIVATE, OURS):
        of_impl = [steps[impl, value] for value in values]
        taken = [times[impl, value] for value in values]
        fastest = [1e3 * min(rounds) for rounds in taken]
        result[impl] = {
            "ms": fastest,
            "median_ms": [1e3 * median(rounds) for rounds in taken],
            "ops": [count_ops(step) for step in of_impl],
            "flops": [_flops(step) for step in of_impl],
            "line": fit_line(values, fastest),
        }
    more = np.subtract(result[OURS]["flops"], result[NON_PRIVATE]["flops"])
    result["line_of_flops_above_non_private"] = fit_line(values, more.tolist())
    return result


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line, and the root mean square of what it misses over the mean of y."""
    slope, intercept = np.polyfit(x, y, 1)
    missed = np.asarray(y) - (slope * np.asarray(x) + intercept)
    residual = float(np.sqrt(np.mean(missed**2)) / abs(mean(y)))
    return {"slope": float(slope), "intercept": float(intercept), "residual": residual}


def plot(growth: dict[str, Any], path: Path) -> None:
    """A panel for each quantity: the time of a step, as a ratio to that at its smallest value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (quantity, entry) in zip(
        figure.subplots(1, len(growth), squeeze=False)[0], growth.items(), strict=True
    ):
        values, unit = np.array(entry["values"]), entry[NON_PRIVATE]["ms"][0]
        for impl, color, marker in ((NON_PRIVATE, "tab:gray", "s"), (OURS, "tab:blue", "o")):
            line, fastest = entry[impl]["line"], np.array(entry[impl]["ms"]) / unit
            fitted = (line["slope"] * values + line["intercept"]) / unit
            axes.plot(values, fitted, color=color, linestyle="--", linewidth=1)
            axes.plot(values, fastest, marker, color=color, alpha=0.8, label=impl)
        missed = (entry[impl]["line"]["residual"] for impl in (OURS, NON_PRIVATE))
        axes.set_title("line misses {:.0%}, non-private {:.0%}".format(*missed), fontsize=9)
        axes.set(xlabel=QUANTITIES[quantity][0], xticks=values)
        axes.set(xlim=(0, 1.06 * axes.dataLim.xmax), ylim=(0, 1.08 * axes.dataLim.ymax))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("step time, over that of non-private\nat the smallest value")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(results: dict[str, Any]) -> str:
    """The measures beside their goals."""
    lines = ["operators of a step that are no views; goal: below the non-private count"]
    for optimizer in OPTIMIZERS:
        counts = {e["impl"]: e["ops"] for e in results["ops"] if e["optimizer"] == optimizer}
        lines.append(f"  {optimizer:14}" + "  ".join(f"{k} {v}" for k, v in counts.items()))
    lines.append(f"time of a step; goals: {OURS} / {NON_PRIVATE} <= 1.05, {OPACUS} / {OURS} >= 1.0")
    for entry in results["time"]:
        for name, r in entry["ratios"].items():
            lines.append(
                f"  {entry['records']:3} records  {name:34}{r['of_medians']:.3f}  "
                f"(quartiles {r['quartile_1']:.3f} to {r['quartile_3']:.3f}, fastest "
                f"{r['of_fastest']:.3f})"
            )
    lines.append("peak memory above non-private, in 4·N·P bytes; goal: <= 1.1")
    for entry in results["memory"]:
        above = "  ".join(f"{k} {v:5.2f}" for k, v in entry["above_non_private"].items())
        lines.append(
            f"  N {entry['records']:3}  rank {entry['rank']:3}  P {entry['parameters']:7}  {above}"
        )
    lines.append("growth; goal: straight lines. What the line misses, over the mean:")
    for quantity, entry in results["growth"].items():
        lines.append(
            f"  {quantity:9}time {entry[OURS]['line']['residual']:.1%} (non-private "
            f"{entry[NON_PRIVATE]['line']['residual']:.1%}), flops above non-private "
            f"{entry['line_of_flops_above_non_private']['residual']:.1%}, ops "
            f"{entry[OURS]['ops']} (non-private {entry[NON_PRIVATE]['ops']})"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: images of ``image`` pixels a side, and numbers of records."""

    image: int = 16
    ops_records: int = 8
    time_rounds: dict[int, int] = field(default_factory=lambda: {8: 40, 32: 24})
    memory_image: int = 4
    memory_records: Sequence[int] = (16, 32, 64)
    memory_ranks: Sequence[int] = (16, 64)
    growth_records: int = 4
    growth_rounds: int = 15
    growth_values: dict[str, Sequence[int]] = field(
        default_factory=lambda: {name: values for name, (_, _, values) in QUANTITIES.items()}
    )


def measure(sizes: Sizes, compiled: bool) -> dict[str, Any]:
    """All of it, in minutes."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    task = small(size=sizes.image)
    return {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "ops": measure_ops(task, sizes.ops_records),
        "time": [
            measure_time(task, records, rounds, compiled and records == max(sizes.time_rounds))
            for records, rounds in sizes.time_rounds.items()
        ],
        "memory": measure_memory(
            lambda rank: small(rank, sizes.memory_image), sizes.memory_records, sizes.memory_ranks
        ),
        "growth": {
            quantity: measure_growth(quantity, values, sizes.growth_records, sizes.growth_rounds)
            for quantity, values in sizes.growth_values.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument(
        "--compile", action="store_true", help="time the compiled pass at the larger batch too"
    )
    arguments = parser.parse_args()
    with quiet():
        results = measure(Sizes(), arguments.compile)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results["growth"], arguments.figure)
    print(table(results))


if __name__ == "__main__":
    main()
