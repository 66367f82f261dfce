"""A training step of each peer: what does it take, what does it hold.

A `Case` is a small UNet with LoRA on random images, and a batch. The weights, the images and the
batch are the same for every peer.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dpengine.execution import memory

from .counting import count_flops, count_ops
from .peers import (
    CUDA_GRAPH,
    NON_PRIVATE,
    OURS,
    RECORDED,
    Start,
    Training,
)
from .training import TARGETS, Task, adamw, begin, small
from .turns import DEVICE, Turns, ratio, wait

CONVOLUTIONS = ("conv1", "conv2")


@dataclass(frozen=True)
class Case:
    """``batch`` records of ``draws`` rows, images of ``size`` pixels a side."""

    batch: int = 16
    draws: int = 1
    rank: int = 4
    size: int = 16
    targets: tuple[str, ...] = TARGETS

    @property
    def task(self) -> Task:
        return small(self.rank, self.size, self.targets, DEVICE)

    @property
    def rows(self) -> int:
        return self.batch * self.draws

    def begin(self, peer: Start) -> tuple[Training, tuple[Tensor, ...]]:
        """Training with AdamW and noise, and the batch."""
        training = begin(self.task, peer, adamw, self.batch, draws=self.draws)
        return training, self.task.inputs(self.rows)


def steps_in_turns(case: Case, peers: Mapping[str, Start]) -> Turns[str]:
    """Steps of all peers on one batch, each with a model of its own, the optimizers' state made."""
    steps = {}
    for name, peer in peers.items():
        training, inputs = case.begin(peer)
        steps[name] = partial(training.step, *inputs)
    turns = Turns(steps)
    turns.warm_up(2)
    return turns


def compared(case: Case, turns: Turns[str]) -> dict[str, Any]:
    """Each peer's time over that of the non-private step and over ours, and images a second."""
    milliseconds = turns.median_ms()
    return {
        "over_non_private": {n: turns.ratio(n, NON_PRIVATE) for n in milliseconds},
        "over_ours": {name: turns.ratio(name, OURS) for name in milliseconds},
        "images_per_s": {name: 1e3 * case.rows / ms for name, ms in milliseconds.items()},
        "median_ms": milliseconds,
    }


def counted(case: Case, peers: Mapping[str, Start]) -> dict[str, dict[str, int]]:
    """Operators of a step that are no views, and its floating-point operations.

    Not of recorded peers: what compiled code does is out of sight of the counters.
    """
    counts: dict[str, dict[str, int]] = {"ops": {}, "flops": {}}
    for name, peer in peers.items():
        if name not in RECORDED:
            step = _warm(case, peer)
            counts["ops"][name] = count_ops(step)
            counts["flops"][name] = count_flops(step)
    return counts


class Phased:
    """A step in phases that keeps the seconds of each, and of their sum, call by call."""

    def __init__(self, training: Training, inputs: tuple[Tensor, ...]) -> None:
        self._phases = training.phases
        self._inputs = inputs
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> None:
        for name, phase in self._phases.items():
            begin = time.perf_counter()
            phase(*self._inputs)
            wait()
            self.seconds[name].append(time.perf_counter() - begin)


def phases_in_turns(
    case: Case, peers: Mapping[str, Start]
) -> tuple[Turns[tuple[str, str]], dict[str, Phased]]:
    """Each peer's step, `whole`, and the same in `phases`, in turns; where the phases are kept."""
    callables: dict[tuple[str, str], Callable[[], None]] = {}
    phased = {}
    for name, peer in peers.items():
        training, inputs = case.begin(peer)
        phased[name] = Phased(training, inputs)
        callables[name, "whole"] = partial(training.step, *inputs)
        callables[name, "phases"] = phased[name]
    turns = Turns(callables)
    turns.warm_up(2)
    for one in phased.values():
        one.seconds.clear()
    return turns, phased


def phase_entry(turns: Turns[tuple[str, str]], phased: dict[str, Phased]) -> dict[str, Any]:
    """Of each peer: its phases over the whole non-private step, and their sum over its step."""
    unit = turns.seconds[NON_PRIVATE, "whole"]
    return {
        name: {
            "over_non_private_step": {k: ratio(s, unit) for k, s in one.seconds.items()},
            "sum_over_whole": turns.ratio((name, "phases"), (name, "whole")),
            "median_ms": {k: 1e3 * median(s) for k, s in one.seconds.items()},
        }
        for name, one in phased.items()
    }


def peaks(case: Case, peers: Mapping[str, Start]) -> dict[str, Any]:
    """Peak memory of a step beyond model, state and batch, and what of it privacy costs.

    `above_non_private` is in units of 4·N·P bytes, the size of N float32 gradients. On a CPU the
    tensors that eager operators return are counted, the same on every machine. Compiled code, on a
    CPU, and a graph that was captured before allocate out of sight of the counter and are left out.
    """
    unseen = (CUDA_GRAPH,) if DEVICE == "cuda" else RECORDED
    names = [name for name in peers if name not in unseen]
    device = torch.device(DEVICE)
    found = {name: memory.peak_bytes(_warm(case, peers[name]), device) for name in names}
    trainable = [p.numel() for p in case.task.make_model().parameters() if p.requires_grad]
    unit = 4 * case.batch * sum(trainable)
    base = found[NON_PRIVATE]
    return {
        "parameters": sum(trainable),
        "peak_bytes": found,
        "over_non_private": {name: peak / base for name, peak in found.items()},
        "above_non_private": {name: (peak - base) / unit for name, peak in found.items()},
    }


def largest_batch(case: Case, peer: Start, max_bytes: int) -> dict[str, Any]:
    """The most records whose step needs at most ``max_bytes`` in all: model, state and batch too.

    Both that number and one more were run; their bytes are given (inf where CUDA ran out).
    """
    task = case.task

    def run(n_records: int) -> None:
        # A model of its own: a step that ran out of memory leaves Opacus' hooks halfway.
        training = begin(task, peer, adamw, n_records)
        for rows in (1, n_records):  # the first makes the optimizer's state
            training.step(*task.inputs(rows))

    def need(n_records: int) -> float:
        try:
            return memory.peak_bytes(partial(run, n_records), torch.device(DEVICE))
        except torch.OutOfMemoryError:
            return math.inf

    best, needed, above = last_that_fits(need, max_bytes)
    return {"records": best, "bytes": needed, "bytes_of_one_more": above}


def last_that_fits(need: Callable[[int], float], max_bytes: float) -> tuple[int, float, float]:
    """The n whose ``need(n)`` is within ``max_bytes`` while that of n + 1 is not, and both needs.

    The line through the last two sizes that were tried tells the next one: needs are nearly affine,
    but from a handful of records only, as operators take other ways for few. Raises ValueError
    where one record does not fit.
    """
    needs = {1: need(1)}
    low, high = 1, None
    if needs[1] > max_bytes:
        raise ValueError(f"max_bytes must hold one record, {needs[1]:,} bytes, got {max_bytes:,}")
    size = 8
    while high != low + 1:
        needs[size] = need(size)
        if needs[size] <= max_bytes:
            low = size
        else:
            high = size
        size = _next_size(needs, max_bytes)
        size = max(low + 1, size if high is None else min(size, high - 1))
    return low, needs[low], needs[high]


def _next_size(needs: dict[int, float], max_bytes: float) -> int:
    """Where the line through the last two sizes reaches the limit; at most 16 times the last."""
    (left, least), (right, most) = sorted(list(needs.items())[-2:])
    if math.isinf(most) or most <= least:
        return (left + right) // 2 if math.isinf(most) else 2 * right
    return min(16 * right, left + int((max_bytes - least) * (right - left) // (most - least)))


def _warm(case: Case, peer: Start) -> Callable[[], None]:
    """A step of training that has its optimizer's state."""
    training, inputs = case.begin(peer)
    step = partial(training.step, *inputs)
    step()
    step()
    return step
