"""The sum that a step must take, and who takes it: nobody is timed before that.

The yardstick is a float64 loop over single records, by autograd alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .peers import (
    CUDA_GRAPH,
    INDUCTOR,
    MAX_GRAD_NORM,
    NON_PRIVATE,
    OURS,
    WITHOUT_PRIVACY,
    Start,
)
from .training import Task, begin, exact_float32

FLOAT64 = 2.0**-40
"""What a sum in float64 may be off by: 2⁻⁵³ for each of thousands of roundings."""
SLACK = {OURS: 2**-22 + 2**-23, INDUCTOR: 2**-22 + 2**-23, CUDA_GRAPH: 2**-22 + 2**-23}
"""By how much of itself our clip factor may be below C / norm: a margin and one rounding."""
OPACUS_EPSILON = 1e-6
"""What Opacus adds to the norm before it divides by it."""


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

        Peers without privacy are eager float32 themselves: they are judged in float64. Our factors
        have a margin, Opacus' an epsilon beside the norm, which is at least C in a factor.
        """
        if peer in WITHOUT_PRIVACY:
            return FLOAT64
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
        judged = _in(task, torch.float64) if name in WITHOUT_PRIVACY else task
        run = partial(clipped_sum, judged, peer, n_records, draws, **how)
        verdicts[name] = _verdict(expected, name, run)
        if not {"wrong", "not_run"} & set(verdicts[name]):
            sound[name] = peer
    for name in {NON_PRIVATE, OURS} & set(peers):
        assert name in sound, (name, verdicts[name])
    return sound, verdicts


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
    task = _in(task, dtype)
    module, inputs = task.make_model().train(), task.inputs(n_records * draws)
    params = [param for param in module.parameters() if param.requires_grad]
    found = []
    with exact_float32():
        for rows in zip(*(tensor.split(draws) for tensor in inputs), strict=True):
            grads = torch.autograd.grad(task.loss(module, *rows), params)
            found.append(torch.cat([grad.flatten() for grad in grads]).double())
    return torch.stack(found)


def _in(task: Task, dtype: torch.dtype) -> Task:
    """The same task, computed in ``dtype``."""

    def inputs(n_rows: int) -> tuple[Tensor, ...]:
        rows = task.inputs(n_rows)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in rows)

    # UNets warn of `to` by name; these have nothing that must stay float32.
    return replace(task, make_model=lambda: nn.Module.to(task.make_model(), dtype), inputs=inputs)


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _clipped(grads: Tensor, max_grad_norm: float) -> Tensor:
    """[N, P] -> [P]"""
    factors = (max_grad_norm / grads.norm(dim=1)).clamp(max=1)
    return factors @ grads
