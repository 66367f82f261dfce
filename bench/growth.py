"""How a training step grows with the batch, the draws, the tokens, the rank and the adapted layers.

Operators, floating-point operations and bytes are counted on a CPU: they are the same on every
machine, and so is what privacy adds to them. Time is that of the GPU where there is one; attention
takes time in T² with and without privacy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpengine.execution.memory import peak_bytes

from .counting import count_flops, count_ops
from .sums import Truth, truth
from .training import TARGETS, Task, adamw, exact_float32, small, start
from .turns import DEVICE, Turns

NON_PRIVATE, OURS = IMPLS = "non-private", "dpengine"
FAST = 1e4
"""A learning rate at which the rounding of the weights hides nothing of their update."""


@dataclass(frozen=True)
class Point:
    """A training step on so many records of so many draws each."""

    task: Task
    records: int = 4
    draws: int = 1


@dataclass(frozen=True)
class Quantity:
    """What is varied: its name on an axis, the step at a value, the values, and all of them."""

    axis: str
    at: Callable[[int], Point]
    values: Sequence[int]
    all_values: Sequence[int]


def _adapters(n_layers: int) -> Point:
    """The UNet has seven attention layers of four linear ones."""
    return Point(small(targets=TARGETS[: n_layers // 7]))


QUANTITIES = {
    "records": Quantity(
        "records per batch N", lambda n: Point(small(), n), (4, 8, 16), (2, 4, 8, 16, 32)
    ),
    "draws": Quantity(
        "draws per record K", lambda k: Point(small(), draws=k), (1, 2, 4), (1, 2, 4, 6, 8)
    ),
    "tokens": Quantity(
        "tokens per image T",
        lambda t: Point(small(size=isqrt(t))),
        (64, 256, 576),
        (64, 144, 256, 400, 576),
    ),
    "rank": Quantity("rank R", lambda r: Point(small(rank=r)), (4, 16, 64), (4, 16, 32, 48, 64)),
    "adapters": Quantity("adapted layers", _adapters, (7, 14, 28), (7, 14, 21, 28)),
}


def measure(name: str, values: Sequence[int], rounds: int) -> dict[str, Any]:
    """The curves of one quantity over its values, each with its line.

    `steps`: of each implementation, the time over that of the non-private step at the smallest
    value in the same round, and counts of operators, floating-point operations and peak bytes.
    `privacy_adds`: our counts less the non-private ones; `ours_over_non_private`: the times.
    """
    points = {value: QUANTITIES[name].at(value) for value in values}
    runs = _runs(points, DEVICE)
    turns = Turns(runs)
    for _ in range(rounds):
        turns.round()
    unit = NON_PRIVATE, values[0]
    on_cpu = runs if DEVICE == "cpu" else _runs(points, "cpu")
    counts = {impl: _counts([on_cpu[impl, value] for value in values]) for impl in IMPLS}
    steps: dict[str, Any] = {}
    for impl in IMPLS:
        ratios = [turns.ratio((impl, value), unit) for value in values]
        line = fit_line(values, [ratio["median"] for ratio in ratios])
        steps[impl] = {"time": {"ratios": ratios, "line": line}}
        steps[impl] |= {what: _curve(values, found) for what, found in counts[impl].items()}
    added = {
        what: _curve(values, np.subtract(ours, counts[NON_PRIVATE][what]).tolist())
        for what, ours in counts[OURS].items()
    }
    return {
        "quantity": name,
        "axis": QUANTITIES[name].axis,
        "values": list(values),
        "records": [point.records for point in points.values()],
        "median_ms_of_unit": turns.median_ms()[unit],
        "steps": steps,
        "privacy_adds": added,
        "ours_over_non_private": [turns.ratio((OURS, v), (NON_PRIVATE, v)) for v in values],
    }


def step(point: Point, impl: str, device: str = "cpu") -> Callable[[], None]:
    """A step with AdamW on one fixed batch; its first ones have made the optimizer's state."""
    training = start(_on(point.task, device), impl, adamw, point.records, draws=point.draws)
    run = partial(training.step, *_inputs(point, device))
    run()
    run()
    return run


def update(point: Point, max_grad_norm: float) -> Tensor:
    """What our step without noise takes from the weights on ``DEVICE``, at learning rate 1.  [P]"""
    sgd = partial(torch.optim.SGD, lr=FAST)
    mechanism = {"noise_multiplier": 0.0, "max_grad_norm": max_grad_norm}
    task = _on(point.task, DEVICE)
    training = start(task, OURS, sgd, point.records, draws=point.draws, **mechanism)
    before = _flat(training.params)
    with exact_float32():
        training.step(*_inputs(point, DEVICE))
    return (before - _flat(training.params)) / FAST


def expected(point: Point) -> Truth:
    """By autograd alone, a backward pass for each record."""
    return truth(point.task, point.records, point.draws)


def check(point: Point, found: Tensor, expected: Truth) -> None:
    """Raise AssertionError unless ``found`` is the update without noise: the mean of the sum.

    It may be twice as wrong as eager PyTorch, beside clip factors that are rounded down.
    """
    error = expected.error(OURS, point.records * found.cpu())
    tolerance = expected.tolerance(OURS)
    if not error <= tolerance:
        raise AssertionError(f"the update is off by {error:.1e} of it, more than {tolerance:.1e}")


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line, and the root mean square of what it misses over the mean of ``|y|``.

    0 where all of y is.
    """
    slope, intercept = np.polyfit(x, y, 1)
    missed = np.asarray(y) - (slope * np.asarray(x) + intercept)
    size = mean(abs(value) for value in y)
    misses = float(np.sqrt(np.mean(missed**2)) / size) if size else 0.0
    return {"slope": float(slope), "intercept": float(intercept), "misses": misses}


def _runs(points: dict[int, Point], device: str) -> dict[tuple[str, int], Callable[[], None]]:
    return {
        (impl, value): step(point, impl, device)
        for value, point in points.items()
        for impl in IMPLS
    }


def _counts(runs: Sequence[Callable[[], None]]) -> dict[str, list[int]]:
    """Of steps on a CPU."""
    return {
        "ops": [count_ops(run) for run in runs],
        "flops": [count_flops(run) for run in runs],
        "peak_bytes": [peak_bytes(run, torch.device("cpu")) for run in runs],
    }


def _curve(values: Sequence[int], counts: list[int]) -> dict[str, Any]:
    return {"counts": counts, "line": fit_line(values, counts)}


def _inputs(point: Point, device: str) -> list[Tensor]:
    return [rows.to(device) for rows in point.task.inputs(point.records * point.draws)]


def _on(task: Task, device: str) -> Task:
    return replace(task, make_model=lambda: task.make_model().to(device))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """float64 [P], a copy"""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
