"""A training step of each peer: is its sum right, what does it take, what does it hold.

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
from torch import Tensor, nn

from dpengine import memory

from .counting import count_flops, count_ops
from .peers import (
    CUDA_GRAPH,
    INDUCTOR,
    MAX_GRAD_NORM,
    NON_PRIVATE,
    OURS,
    RECORDED,
    WITHOUT_PRIVACY,
    Start,
    Training,
)
from .training import TARGETS, Task, adamw, begin, exact_float32, small
from .turns import DEVICE, Turns, ratio, wait

CONVOLUTIONS = ("conv1", "conv2")
SLACK = {OURS: 2**-22 + 2**-23, INDUCTOR: 2**-22 + 2**-23, CUDA_GRAPH: 2**-22 + 2**-23}
"""By how much of itself our clip factor may be below C / norm: a margin and one rounding."""
OPACUS_EPSILON = 1e-6
"""What Opacus adds to the norm before it divides by it."""


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


@dataclass(frozen=True)
class Truth:
    """The sum over records of min(1, C / norm) · gradient, and the norms; float64.  [P], [N]

    max_grad_norm: C. plain_sum: without the factors. rounding: the relative error of the same loop
    in float32, of whichever sum has more.
    """

    clipped_sum: Tensor
    plain_sum: Tensor
    norms: Tensor
    max_grad_norm: float
    rounding: float

    def error(self, peer: str, found: Tensor) -> float:
        """Distance from the sum that the peer should give, over its length."""
        exact = self.plain_sum if peer in WITHOUT_PRIVACY else self.clipped_sum
        return _distance(found, exact)

    def tolerance(self, peer: str) -> float:
        """Twice the error of eager float32, and how far the peer's clip factors are from C / norm.

        Ours have a margin, Opacus' an epsilon beside the norm, which is at least C in a factor.
        """
        if peer in WITHOUT_PRIVACY:
            # One float32 sum over all records, where the loop rounds each by itself.
            return 2 * self.rounding * len(self.norms) ** 0.5
        smallest = max(self.max_grad_norm, float(self.norms.min()))
        return 2 * self.rounding + SLACK.get(peer, OPACUS_EPSILON / smallest)


def truth(task: Task, n_records: int, draws: int = 1) -> Truth:
    """From one backward pass for each record, through the mean loss of its draws.

    C lies in the middle of the norms: half of the records are clipped, and half show the scale of
    their gradients, which a sum of clipped ones alone would not.
    """
    grads = _loop(task, n_records, draws, torch.float64)
    norms = grads.norm(dim=1)
    bound = float(norms.quantile(0.5))
    clipped, plain = _clipped(grads, bound), grads.sum(0)
    rounded = _loop(task, n_records, draws, torch.float32)
    rounding = max(_distance(_clipped(rounded, bound), clipped), _distance(rounded.sum(0), plain))
    return Truth(clipped, plain, norms, bound, rounding)


def clipped_sum(
    task: Task,
    peer: Start,
    n_records: int,
    draws: int = 1,
    *,
    max_grad_norm: float = MAX_GRAD_NORM,
    inputs: tuple[Tensor, ...] | None = None,
    in_phases: bool = False,
) -> Tensor:
    """What a step without noise hands to its optimizer, times the divisor; float64.  [P]

    inputs: other rows than the task's own.
    """
    mechanism = {"noise_multiplier": 0.0, "max_grad_norm": max_grad_norm}
    seen: list[Tensor] = []

    def make_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        def keep(*_: object) -> None:
            grads = torch.cat([param.grad.flatten() for param in params])
            seen.append(n_records * grads.double())

        optimizer = torch.optim.SGD(params, lr=1e-3)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    training = begin(task, peer, make_optimizer, n_records, draws=draws, **mechanism)
    inputs = inputs or task.inputs(n_records * draws)
    with exact_float32():
        for phase in training.phases.values() if in_phases else [training.step]:
            phase(*inputs)
    (found,) = seen
    return found


Verdicts = dict[str, dict[str, Any]]


def examine(
    task: Task,
    peers: Mapping[str, Start],
    n_records: int,
    draws: int = 1,
    *,
    in_phases: bool = False,
) -> tuple[dict[str, Start], Verdicts]:
    """The peers that run and give the right sum, as a whole step or in phases, and what was found.

    A verdict holds the relative `error` and its `tolerance`, and `wrong` where it is above, or
    `not_run` with the reason. Peers without privacy must give the sum without clipping. Raises
    AssertionError unless dpengine's eager step and the non-private one are right.
    """
    expected = truth(task, n_records, draws)
    sound, verdicts = {}, {}
    for name, peer in peers.items():
        bound = expected.max_grad_norm
        how = {"max_grad_norm": bound, "in_phases": in_phases}
        run = partial(clipped_sum, task, peer, n_records, draws, **how)
        verdicts[name] = _verdict(expected, name, run)
        if not {"wrong", "not_run"} & set(verdicts[name]):
            sound[name] = peer
    for name in {NON_PRIVATE, OURS} & set(peers):
        assert name in sound, (name, verdicts[name])
    return sound, verdicts


def _verdict(expected: Truth, name: str, run: Callable[[], Tensor]) -> dict[str, Any]:
    try:
        error = expected.error(name, run())
    except Exception as reason:  # what a peer refuses, and how, is its own affair
        text = (str(reason).strip().splitlines() or [""])[0]
        return {"not_run": f"{type(reason).__name__}: {text}"[:300]}
    tolerance = expected.tolerance(name)
    found = {"error": error, "tolerance": tolerance}
    return found if error <= tolerance else found | {"wrong": True}


def _loop(task: Task, n_records: int, draws: int, dtype: torch.dtype) -> Tensor:
    """The gradient of each record's mean loss, computed in ``dtype``; float64.  [N, P]"""
    # UNets warn of `to` by name; these have nothing that must stay float32.
    module = nn.Module.to(task.make_model().train(), dtype)
    params = [param for param in module.parameters() if param.requires_grad]
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in task.inputs(n_records * draws)]
    found = []
    with exact_float32():
        for rows in zip(*(tensor.split(draws) for tensor in inputs), strict=True):
            grads = torch.autograd.grad(task.loss(module, *rows), params)
            found.append(torch.cat([grad.flatten() for grad in grads]).double())
    return torch.stack(found)


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _clipped(grads: Tensor, max_grad_norm: float) -> Tensor:
    """[N, P] -> [P]"""
    factors = (max_grad_norm / grads.norm(dim=1)).clamp(max=1)
    return factors @ grads


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


def contributions(task: Task, peer: Start, n_records: int, draws: int) -> dict[str, float]:
    """How far the last record moves the clipped sum, in units of C, beside the others.

    `random`: with draws as they come. `aligned`: with K equal draws, whose gradients point the same
    way; a mechanism must cover the worst case.
    """
    rows = task.inputs(n_records * draws)
    others = tuple(tensor[:-draws] for tensor in rows)
    aligned = tuple(torch.cat([t[:-draws], t[-1:].expand_as(t[-draws:])]) for t in rows)
    without = clipped_sum(task, peer, n_records - 1, draws, inputs=others)
    moved = {
        kind: float((clipped_sum(task, peer, n_records, draws, inputs=full) - without).norm())
        for kind, full in (("random", rows), ("aligned", aligned))
    }
    return {kind: distance / MAX_GRAD_NORM for kind, distance in moved.items()}


def _warm(case: Case, peer: Start) -> Callable[[], None]:
    """A step of training that has its optimizer's state."""
    training, inputs = case.begin(peer)
    step = partial(training.step, *inputs)
    step()
    step()
    return step
