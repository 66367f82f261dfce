"""Whether a module keeps the records of a batch apart, looked at on batches that it trains on.

A user's own loop has no synthetic rows that fit the module, so the rows of the batch are used: some
of them silenced, some left out, in another order, forward and backward. What is told of it is the
name of a module.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..mechanism.secure_random import SecureRandom
from .capture import Capture
from .comparisons import (
    compare_chosen,
    compare_gradients,
    compare_silenced,
    refuse_inert,
    silenced,
)
from .probing import moved_off_init
from .soundness import count_rows
from .wiring import Hook

_AGAIN = 1 / 256
"""Chance of a look at a batch of a shape that was looked at: a few percent of the time."""

_LARGER = 1.5


def look_now_and_then(capture: Capture) -> None:
    """Look at the first batch of two records or more, at new shapes, and at some that are drawn.

    A shape is new where anything but the number of rows is, or where there are half as many rows
    again as in any look. The forward pass raises PrivacyError, before its records are part of a
    batch, where for one record the input of a trained layer, the output of the module, or the
    gradient of what it gives changes as others are set to zero, left out, or put in another order,
    or as nothing is changed; where the pass leaves something behind in the module; and where a
    trained layer takes no part in it, or gets no gradient. The next pass then looks again. Trained
    tensors are moved off their start meanwhile, so that a factor of zero hides nothing.

    Not seen: a loss outside of the module.
    """
    random, shapes, most, is_looking = SecureRandom(), set(), 0, False

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal most, is_looking
        if is_looking or not capture.takes_gradients:
            return
        n_rows = count_rows((*args, *kwargs.values()))
        shape = _shape((args, kwargs), n_rows)
        is_new = shape not in shapes or n_rows > _LARGER * most
        if n_rows < 2 * capture.draws_per_record or not (is_new or _coin(random)):
            return
        is_looking = True
        try:
            _look(capture, (args, kwargs), n_rows, is_first=not shapes)
        finally:
            is_looking = False
        shapes.add(shape)
        most = max(most, n_rows)

    handle = capture.module.register_forward_pre_hook(Hook(look), with_kwargs=True, prepend=True)
    capture.at_detach(handle.remove)


def _coin(random: SecureRandom) -> bool:
    return bool(random.uniform(1)[0] < _AGAIN)


def _shape(inputs: tuple, n_rows: int) -> tuple:
    """Shapes and types of the tensors that go in, whatever the number of rows."""
    return tuple(
        (leaf.dtype, tuple(size for size in leaf.shape if size != n_rows))
        for leaf in tree_leaves(inputs)
        if isinstance(leaf, Tensor)
    )


def _look(capture: Capture, inputs: tuple, n_rows: int, is_first: bool) -> None:
    record = torch.arange(n_rows) // capture.draws_per_record
    everyone = record >= 0
    capture.watch.check_bits(undisturbed=False)
    try:
        with moved_off_init(capture.parameters):
            with torch.no_grad(), capture.suspended():
                compare_silenced(capture, inputs, record)
                compare_chosen(capture, silenced(inputs, everyone), record)
            compare_gradients(capture, silenced(inputs, everyone), record)
            if is_first:
                refuse_inert(capture, inputs, n_rows)
    finally:
        # Also where the look refuses for another cause: what was written stays.
        capture.watch.check_bits(undisturbed=True)
