"""What a look at a batch compares: its records beside others, alone, and in another order.

All take the inputs of a captured module, (args, kwargs), and the record of each row, int64 [rows].
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import PrivacyError
from .capture import Capture
from .probing import SAME, WAY_OUT, first_change, mixing, randomness, run_parts

_ALIKE = 1e-3
"""Relative difference up to which two batches of other sizes gave a record the same, in float32."""

_ALIKE_BELOW = 0.1
"""The same where computations round to fewer bits; mixing moves a record by more."""

_ZERO = 1e-6
"""Norm of a tensor's gradient over that of all tensors, up to which it is rounding."""

_DRAWS = 3


def compare_silenced(capture: Capture, inputs: tuple, record: Tensor) -> None:
    """Forward passes in which some records are zero; the others must not see it."""
    is_first, is_last, everyone = record == 0, record == record[-1], record >= 0
    before = _views(capture, silenced(inputs, everyone), len(record))
    called = {who for who, _ in before}
    idle = [layer.name for layer in capture.layers if _given(layer.name) not in called]
    if idle:
        raise PrivacyError(
            "trained layers take no part in the forward pass, and noise alone would train them: "
            f"{', '.join(idle[:4])}{' and others' if len(idle) > 4 else ''}; freeze them by "
            "requires_grad_(False) before the optimizer is made, or call them, as where q, k and v "
            "were fused after the adapter was added"
        )
    for kept in (everyone, ~is_first, ~is_last, is_first, is_last):
        after = _views(capture, silenced(inputs, kept), len(record))
        differing = _differing(before, after, kept, kept, SAME)
        if differing is not None:
            part = _part(capture.module, inputs, everyone, kept)
            cause = randomness(part or differing) if kept is everyone else mixing(part)
            _refuse(cause or f"{differing} changes for one record with another; {WAY_OUT}")


def compare_chosen(capture: Capture, inputs: tuple, record: Tensor) -> None:
    """Forward passes with fewer records, and with all of them in another order."""
    before = _views(capture, inputs, len(record))
    for rows, why in _choices(record, capture.draws_per_record):
        after = _views(capture, _chosen(inputs, rows, len(record)), len(rows))
        everyone = torch.ones(len(rows), dtype=torch.bool)
        differing = _differing(before, after, rows, everyone, _tolerance(inputs, capture))
        if differing is not None:
            _refuse(
                f"{differing} changes for a record {why}. Each tensor along whose first axis there "
                "are records must have a line for each row of the batch, and be computed from that "
                "row alone: expand what all records share, such as learned queries and positions, "
                f"to the batch; {WAY_OUT}"
            )


def compare_gradients(capture: Capture, inputs: tuple, record: Tensor) -> None:
    """Per-record gradients of what the module gives, beside other records and in another order.

    Of its outputs with rows, and of those without, such as a loss that it computes itself: a sum
    over the records or a mean, which has half of the records weigh twice as much.
    """
    n_rows, draws = len(record), capture.draws_per_record
    is_first, everyone = record == 0, torch.arange(n_rows)
    trials = [(silenced(inputs, is_first), everyone, "beside records that are zero")]
    trials += [(_chosen(inputs, rows, n_rows), rows, why) for rows, why in _choices(record, draws)]
    tolerance = _tolerance(inputs, capture)
    for of in (_rows_given, _totals_given):
        before = _gradients(capture, inputs, n_rows, of)
        if before is None:
            continue
        for chosen, rows, why in trials:
            after = _gradients(capture, chosen, len(rows), of)
            if after is None:
                continue
            of_record = record[rows][::draws]
            kept = of_record == 0 if rows is everyone else of_record >= 0
            scales = {1.0} if of is _rows_given else {1.0, len(rows) / n_rows}
            if not any(
                _same_gradients(before, after, of_record, kept, scale, tolerance)
                for scale in scales
            ):
                _refuse(
                    f"the gradient of a record changes {why}, as where a hook, a backward pass of "
                    "one's own or a loss inside the module mixes records, or a mean is taken over "
                    f"what is not padding; remove it, or {WAY_OUT}"
                )


def refuse_inert(capture: Capture, inputs: tuple, n_rows: int) -> None:
    """Raise PrivacyError for trained tensors whose gradient is zero whatever goes in.

    Told on rows of random numbers, where the module takes such, so that no private value decides;
    on a few draws of them, as one may be a special case.
    """
    generator = torch.Generator().manual_seed(0)

    def public(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != n_rows:
            return leaf
        if not leaf.is_floating_point():
            return torch.randint(2, leaf.shape, generator=generator).to(leaf)
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    reached: set[Tensor] = set()
    for _ in range(_DRAWS):
        drawn = tree_map(public, inputs)
        try:
            grads = [_gradients(capture, drawn, n_rows, of) for of in (_rows_given, _totals_given)]
        except (IndexError, RuntimeError, ValueError):
            return
        reached |= set().union(*(_reached(found) for found in grads if found is not None))
        if len(reached) == len(capture.parameters):
            return
    names = {param: name for name, param in capture.module.named_parameters()}
    inert = [names[param] for param in capture.parameters if param not in reached]
    if reached and inert:
        raise PrivacyError(
            "tensors are trained whose gradient is zero for every record, and noise alone would "
            f"train them: {', '.join(inert[:4])}{' and others' if len(inert) > 4 else ''}; freeze "
            "them by requires_grad_(False) before the optimizer is made, as q and k of an "
            "attention to a single token"
        )


def _reached(grads: dict[Tensor, Tensor]) -> set[Tensor]:
    """The tensors whose gradient is not zero beside that of all tensors, for some record."""
    norms = {p: of_p.flatten(1).double().norm(dim=1).cpu() for p, of_p in grads.items()}
    total = torch.stack(list(norms.values())).norm(dim=0)
    return {
        param for param, norm in norms.items() if ((norm > _ZERO * total) | ~total.isfinite()).any()
    }


def _refuse(cause: str) -> None:
    raise PrivacyError(f"the records of a batch are not kept apart: {cause}")


def _choices(record: Tensor, draws: int) -> list[tuple[Tensor, str]]:
    """Rows of half of the records, and of all of them from the last to the first."""
    n_records = int(record[-1]) + 1
    by_record = torch.arange(len(record)).view(n_records, draws)
    return [
        (by_record[: n_records // 2].flatten(), "with the number of rows"),
        (by_record.flip(0).flatten(), "with its place in the batch"),
    ]


def _tolerance(inputs: tuple, capture: Capture) -> float:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    short = any(t.is_floating_point() and t.element_size() < 4 for t in tensors)
    short |= any(p.element_size() < 4 for p in capture.module.parameters())
    devices = {tensor.device.type for tensor in tensors}
    return _ALIKE_BELOW if short or any(map(torch.is_autocast_enabled, devices)) else _ALIKE


def _chosen(inputs: tuple, rows: Tensor, n_rows: int) -> tuple:
    """``inputs`` with these rows alone, in this order."""

    def of_rows(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != n_rows:
            return leaf
        return leaf[rows.to(leaf.device)]

    return tree_map(of_rows, inputs)


def silenced(inputs: tuple, kept: Tensor) -> tuple:
    """``inputs`` where only the rows ``kept``, bool [rows], are not zero, and all are finite."""

    def one(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != len(kept):
            return leaf
        leaf = torch.nan_to_num(leaf.detach(), posinf=0, neginf=0)  # they would hide what mixes
        leaf[~kept.to(leaf.device)] = 0
        return leaf

    return tree_map(one, inputs)


def _views(capture: Capture, inputs: tuple, n_rows: int) -> list[tuple[str, Tensor]]:
    """Two numbers for each row of each trained layer's input, in order, and of the output."""
    views: list[tuple[str, Tensor]] = []

    def see(who: str, tree: object) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == n_rows:
                views.append((who, _numbers(leaf)))

    def enter(who: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(who, (args, kwargs))

    with ExitStack() as hooks:
        for layer in capture.layers:
            hook = partial(enter, _given(layer.name))
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        args, kwargs = inputs
        output = capture.module(*args, **kwargs)
    see("what the model gives", _leaves(output))
    return views


def _given(layer: str) -> str:
    return f"what layer {layer!r} is given"


def _gradients(
    capture: Capture, inputs: tuple, n_rows: int, of: Callable[[object, int, int], list[Tensor]]
) -> dict[Tensor, Tensor] | None:
    """Per-record gradients of the sum of what ``of`` makes of the output; None where it is nothing.

    -> [N, ...] of each trained tensor.
    """
    args, kwargs = inputs
    found = True

    def loss(rows: Tensor) -> Tensor:
        nonlocal found
        terms = of(capture.module(*args, **kwargs), n_rows, capture.draws_per_record)
        found = bool(terms)
        # What gives nothing has no gradient, and closes its set all the same.
        return sum(terms) if terms else sum(p.sum() for p in capture.parameters) * 0

    with torch.enable_grad():
        run: Callable[[Tensor], list[Tensor]] = capture.as_function(loss)
        try:
            grads = run(torch.empty(n_rows))
        except PrivacyError:
            if found:
                raise
            return None
        finally:
            for param in capture.parameters:
                param.grad = None
    return dict(zip(capture.parameters, [g.detach().clone() for g in grads], strict=True))


def _rows_given(output: object, n_rows: int, draws: int) -> list[Tensor]:
    """A fixed weighted sum of each output with rows, the same for each record."""
    given = [leaf for leaf in _differentiable(output) if leaf.ndim > 0 and len(leaf) == n_rows]
    of_records = [leaf.float().unflatten(0, (-1, draws)) for leaf in given]
    return [(records * _direction(records)).sum() for records in of_records]


def _totals_given(output: object, n_rows: int, draws: int) -> list[Tensor]:
    """The sum of each other output."""
    given = [leaf for leaf in _differentiable(output) if leaf.ndim == 0 or len(leaf) != n_rows]
    return [leaf.float().sum() for leaf in given]


def _differentiable(output: object) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(_leaves(output)) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.requires_grad]


def _direction(leaf: Tensor) -> Tensor:
    """A fixed weight for each value of a record."""
    values = torch.arange(leaf[0].numel(), dtype=torch.float32, device=leaf.device)
    return (values + 1).cos().view(leaf[0].shape)


def _same_gradients(
    before: dict[Tensor, Tensor],
    after: dict[Tensor, Tensor],
    record: Tensor,
    kept: Tensor,
    scale: float,
    tol: float,
) -> bool:
    """Whether each record kept has ``scale`` times its gradient after, by its norm over all."""
    distance = norm = torch.zeros(len(record), dtype=torch.float64)
    for param, grads in after.items():
        one = before[param][record.to(grads.device)].flatten(1).double().cpu()
        other = scale * grads.flatten(1).double().cpu()
        distance = distance + (one - other).square().sum(1)
        norm = norm + one.square().sum(1)
    same = (distance <= tol**2 * norm) | ~norm.isfinite()
    return bool(same[kept].all())


def _leaves(output: object) -> object:
    if is_dataclass(output):
        return [getattr(output, field.name) for field in fields(output)]
    return output


def _numbers(tensor: Tensor) -> Tensor:
    """The norm of each row, and its product with one fixed direction.  float64 [rows, 2]"""
    rows = tensor.detach().float().flatten(1) if tensor.ndim > 1 else tensor.float()[:, None]
    direction = torch.arange(rows.shape[1], dtype=torch.float32, device=rows.device).cos()
    direction /= direction.norm()
    return torch.stack([rows.norm(dim=1), rows @ direction], dim=1).double().cpu()


def _differing(
    before: list[tuple[str, Tensor]],
    after: list[tuple[str, Tensor]],
    rows_before: Tensor,
    rows_after: Tensor,
    tolerance: float,
) -> str | None:
    """What differs first between two passes in the rows chosen, each measured by its own norm."""
    for (one, _), (other, _) in zip(before, after, strict=False):
        if one != other:
            return one
    if len(before) != len(after):
        return max(before, after, key=len)[min(len(before), len(after))][0]
    for (who, a), (_, b) in zip(before, after, strict=True):
        a, b = a[rows_before], b[rows_after]
        close = ((a - b).abs() <= tolerance * a[:, :1]) & a[:, :1].isfinite()
        same = close | (a == b) | (a.isnan() & b.isnan())
        if not same.all():
            return who
    return None


def _part(module: nn.Module, inputs: tuple, everyone: Tensor, kept: Tensor) -> str | None:
    """The first part whose output changes while its input does not; takes a copy of all outputs."""

    def call(kept: Tensor) -> Any:
        args, kwargs = silenced(inputs, kept)
        return module(*args, **kwargs)

    before, _ = run_parts(module, partial(call, everyone))
    after, _ = run_parts(module, partial(call, kept))
    return first_change(before, after, kept)
