"""One operation by each implementation: is it right, and how far is it from the machine's limit.

On a CPU ours is the eager specification itself. The limit, or roofline, is what the same bytes take
to be copied or the same arithmetic takes as one large matrix product, whichever is longer. Both are
measured in each round beside the operation, so what else the machine does slows them alike.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpengine.kernels import ops

from . import layers
from .shapes import Shape
from .turns import DEVICE, Turns, ratio, wait

OURS, EAGER, OPACUS = "dpengine", "eager", "opacus"
COPY, PRODUCT = "copy", "product"
KINDS = {OURS: "triton", EAGER: "eager", OPACUS: "opacus"}
if DEVICE == "cpu":
    KINDS = {OURS: "eager", OPACUS: "opacus"}
SLAB_OPS = ("sq_norms", "clip_and_sum")
_SIDE = 768 if DEVICE == "cpu" else 4096
"""Of the square matrices whose product tells the rate of arithmetic: enough to fill the device."""
_SECONDS = 0.004
"""What the calls of one turn take at least, so that the clock's own time does not count."""
_ABOVE = 0.05
"""How far an upper bound of a norm may lie above it."""

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Operation:
    """``calls[impl]()`` runs it once on inputs that are there; ``results(impl, dtype)`` gives what
    it returns on fresh ones.

    bytes_moved, flops: the least that it must move and compute. allowed: how far float32 may be
    off, relative to a result.
    """

    calls: dict[str, Callable[[], object]]
    results: Callable[[str, torch.dtype], Results]
    bytes_moved: int
    flops: int
    allowed: float


def of_layer(op: str, shape: Shape) -> Operation:
    """An op of ``layers.USED`` on float32 activations and backprops."""

    def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        with torch.random.fork_rng([0] if DEVICE == "cuda" else []):
            torch.manual_seed(0)
            made = layers.make_inputs(op, shape, torch.float32, DEVICE)
        exact = dtype == torch.float64
        return {name: _widened(value) if exact else value for name, value in made.items()}

    def results(impl: str, dtype: torch.dtype) -> Results:
        return layers.named(op, layers.caller(op, KINDS[impl])(inputs(dtype)))

    once = inputs()
    return Operation(
        calls={i: partial(layers.caller(op, kind), once) for i, kind in KINDS.items()},
        results=results,
        bytes_moved=layers.bytes_of(op, once),
        flops=layers.flops_of(op, shape),
        allowed=rounding(layers.summands_of(op, shape), layers.depth_of(shape)),
    )


def of_slab(op: str, n_records: int, n_values: int) -> Operation:
    """Norms of gradients [N, P] that were stored, or their clipped sum; half are clipped."""
    generator = torch.Generator().manual_seed(0)
    slab = torch.randn(n_records, n_values, generator=generator).to(DEVICE)
    bound = math.sqrt(n_values)

    def run(impl: str, grads: Tensor) -> Tensor:
        if impl == OPACUS:
            norms = grads.norm(dim=1)
            if op == "sq_norms":
                return norms
            return torch.einsum("i,i...", (bound / (norms + 1e-6)).clamp(max=1), grads)
        kind = "triton" if KINDS[impl] == "triton" else "reference"
        squares = ops.sq_norms([grads], impl=kind)
        if op == "sq_norms":
            return squares
        kept = torch.ones(n_records, dtype=torch.bool, device=DEVICE)
        return ops.clip_and_sum([grads], squares, kept, max_grad_norm=bound, impl=kind)

    def results(impl: str, dtype: torch.dtype) -> Results:
        found = run(impl, slab.to(dtype))
        if op == "clip_and_sum":
            return {"sum": found}
        return {"norms": found if impl == OPACUS else found.sqrt()}

    # A clipped sum reads the gradients for their norms and again for the sum.
    reads = 1 if op == "sq_norms" else 2
    return Operation(
        calls={impl: partial(run, impl, slab) for impl in KINDS},
        results=results,
        bytes_moved=reads * slab.nbytes,
        flops=2 * reads * n_records * n_values,
        allowed=rounding(n_values, n_values),
    )


def rounding(summands: int, depth: int) -> float:
    """What float32 may misplace in a sum of m random terms, relative to its length.

    Term after term about √(m/2)·2⁻²⁴, as the errors of the partial sums, √1, √2, ... √m long, are
    independent: eight times √m·2⁻²⁴ is allowed. Never more than ``depth``·2⁻²⁴, the worst case of
    so many additions behind one another.
    """
    return min(8 * summands**0.5, depth) * 2.0**-24


def examine(operation: Operation, *, upper_bound: bool = False) -> dict[str, dict[str, Any]]:
    """Of each implementation the relative ``error`` of what it is furthest off in, and ``wrong``.

    The error is that against the specification in float64. No result of an implementation enters
    the tolerance, so none can loosen it. An ``upper_bound`` of norms, of ours, must not be below
    them. Raises AssertionError where the specification and Opacus' formula disagree in float64:
    then nobody can say which is right.
    """
    eager = EAGER if EAGER in operation.calls else OURS
    exact = operation.results(eager, torch.float64)
    apart = _error(operation.results(OPACUS, torch.float64), exact)
    # Clip factors: ours have a margin of 2⁻²², Opacus' 1e-6 beside norms far above 1.
    assert apart <= 2**-21, f"the specification and Opacus' formula are {apart:.1e} apart"
    found = {}
    for impl in operation.calls:
        given = operation.results(impl, torch.float32)
        error, tolerance = _error(given, exact), operation.allowed
        below = False
        if upper_bound and impl != OPACUS:
            tolerance = _ABOVE
            # The exact value is itself a bound, with the slack of float64.
            below = bool((given["norms"] < exact["norms"] * (1 - 1e-9)).any())
        found[impl] = {"error": error, "tolerance": tolerance}
        if below or not error <= tolerance:
            found[impl]["wrong"] = True
    return found


def in_turns(operation: Operation, impls: list[str]) -> tuple[Turns[str], int, int]:
    """Those implementations, the copy and the product; how many calls a turn has, and products.

    The copies are as many as the calls; the products last about as long as the turn of ours, or a
    disturbance of a short one would count many times over.
    """
    calls = {impl: operation.calls[impl] for impl in impls}
    for call in calls.values():
        call()
    n_calls = math.ceil(_SECONDS / max(_seconds(calls[OURS]), 1e-6))
    # Half is read and half is written.
    source = torch.zeros(max(1, operation.bytes_moved // 8), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    matrix = torch.randn(_SIDE, _SIDE, device=DEVICE)
    product = partial(torch.mm, matrix, matrix)
    product()
    n_products = max(1, round(n_calls * _seconds(calls[OURS]) / _seconds(product)))
    peers = {impl: partial(_repeated, call, n_calls) for impl, call in calls.items()}
    peers[COPY] = partial(_repeated, partial(target.copy_, source), n_calls)
    peers[PRODUCT] = partial(_repeated, product, n_products)
    turns = Turns(peers)
    turns.warm_up(2)
    return turns, n_calls, n_products


def compared(
    operation: Operation, turns: Turns[str], n_calls: int, n_products: int
) -> dict[str, Any]:
    """Each implementation's time over ours and its share of the roofline; what binds that."""
    products_needed = n_calls * operation.flops / (2 * _SIDE**3)
    copies = turns.seconds[COPY]
    products = [products_needed * taken / n_products for taken in turns.seconds[PRODUCT]]
    limits = [max(pair) for pair in zip(copies, products, strict=True)]
    impls = [impl for impl in turns.seconds if impl not in (COPY, PRODUCT)]
    return {
        "bytes": operation.bytes_moved,
        "flops": operation.flops,
        "over_ours": {impl: turns.ratio(impl, OURS) for impl in impls if impl != OURS},
        "share_of_roofline": {impl: ratio(limits, turns.seconds[impl]) for impl in impls},
        "bound_by": "bytes" if sum(copies) > sum(products) else "arithmetic",
        "median_us": {impl: 1e3 * turns.median_ms()[impl] / n_calls for impl in impls},
    }


def _repeated(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _seconds(call: Callable[[], object]) -> float:
    wait()
    begin = time.perf_counter()
    _repeated(call, 3)
    wait()
    return (time.perf_counter() - begin) / 3


def _widened(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _error(found: Results, exact: Results) -> float:
    """The largest relative distance of an output."""
    return max(
        float((found[name].double() - truth).norm() / truth.norm()) for name, truth in exact.items()
    )
