"""Whether a module keeps the records of a batch apart, looked at on the first batch it trains on.

A user's own loop has no synthetic rows that fit the module, so the rows of the batch are used, some
of them silenced, without gradients. What is told of it is the name of a module.
"""

from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .capture import Capture
from .errors import PrivacyError
from .probing import SAME, WAY_OUT, first_change, mixing, moved_off_init, randomness, run_parts
from .rerouting import Hook
from .trained import count_rows


def look_once(capture: Capture) -> None:
    """Look at the first batch of two records or more that the module is trained on.

    The forward pass raises PrivacyError, before its records are part of a batch, where the input of
    a trained layer or the output of the module changes for one record when others are set to zero,
    or when nothing is changed; the next one then looks again. Trained tensors are moved off their
    start meanwhile, so that a factor of zero hides nothing.

    Not seen: a loss outside of the module, a number for the whole batch that it gives beside the
    rows, and layers after the last trained one where there is no output with rows.
    """

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        n_rows = count_rows((*args, *kwargs.values()))
        if n_rows < 2 * capture.draws_per_record:
            return
        with torch.no_grad(), capture.suspended(), moved_off_init(capture.parameters):
            _look(capture, (args, kwargs), n_rows)
        handle.remove()

    handle = capture.module.register_forward_pre_hook(Hook(look), with_kwargs=True, prepend=True)
    capture.at_detach(handle.remove)


def _look(capture: Capture, inputs: tuple, n_rows: int) -> None:
    record = torch.arange(n_rows) // capture.draws_per_record
    is_first, is_last = record == 0, record == record[-1]
    everyone = record >= 0
    before = _views(capture, inputs, everyone)
    for kept in (everyone, ~is_first, ~is_last, is_first, is_last):
        differing = _differing(before, _views(capture, inputs, kept), kept)
        if differing is not None:
            part = _part(capture.module, inputs, everyone, kept)
            cause = randomness(part or differing) if kept is everyone else mixing(part)
            cause = cause or f"{differing} changes for one record with another; {WAY_OUT}"
            raise PrivacyError(f"the records of a batch are not kept apart: {cause}")


def _call(module: nn.Module, inputs: tuple, kept: Tensor) -> Any:
    """The output of ``module`` where only the rows ``kept``, bool [rows], are not zero."""

    def silenced(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != len(kept):
            return leaf
        leaf = torch.nan_to_num(leaf, posinf=0, neginf=0)  # they would hide what mixes them
        leaf[~kept.to(leaf.device)] = 0
        return leaf

    args, kwargs = tree_map(silenced, inputs)
    return module(*args, **kwargs)


def _views(capture: Capture, inputs: tuple, kept: Tensor) -> list[tuple[str, Tensor]]:
    """Two numbers for each row of each trained layer's input, in order, and of the output."""
    views: list[tuple[str, Tensor]] = []

    def see(who: str, tree: object) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(kept):
                views.append((who, _numbers(leaf)))

    def enter(who: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(who, (args, kwargs))

    with ExitStack() as hooks:
        for layer in capture.layers:
            hook = partial(enter, f"what layer {layer.name!r} is given")
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        output = _call(capture.module, inputs, kept)
    if is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    see("what the model gives", output)
    return views


def _numbers(tensor: Tensor) -> Tensor:
    """The norm of each row, and its product with one fixed direction.  float64 [rows, 2]"""
    rows = tensor.detach().float().flatten(1) if tensor.ndim > 1 else tensor.float()[:, None]
    direction = torch.arange(rows.shape[1], dtype=torch.float32, device=rows.device).cos()
    direction /= direction.norm()
    return torch.stack([rows.norm(dim=1), rows @ direction], dim=1).double().cpu()


def _differing(
    before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], kept: Tensor
) -> str | None:
    """What differs first in the rows ``kept``, each measured by its own norm."""
    if [who for who, _ in before] != [who for who, _ in after]:
        return "the way through the model"
    for (who, a), (_, b) in zip(before, after, strict=True):
        a, b = a[kept], b[kept]
        close = ((a - b).abs() <= SAME * a[:, :1]) & a[:, :1].isfinite()
        same = close | (a == b) | (a.isnan() & b.isnan())
        if not same.all():
            return who
    return None


def _part(module: nn.Module, inputs: tuple, everyone: Tensor, kept: Tensor) -> str | None:
    """The first part whose output changes while its input does not; takes a copy of all outputs."""
    before, _ = run_parts(module, partial(_call, module, inputs, everyone))
    after, _ = run_parts(module, partial(_call, module, inputs, kept))
    return first_change(before, after, kept)
