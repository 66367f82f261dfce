"""What a layer's rule needs of the batch that it runs in, and what several rules share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class SlotSet(Protocol):
    """The slots of one physical batch, a place for each record's gradient.

    n_slots: N, the records of the batch, padding included; its N·K rows are ordered ``n * K + k``.
    impl: how operators compute, as in ``kernels.ops``.
    """

    n_slots: int
    impl: str

    def on_backward(self) -> None:
        """Called at the start of each backward pass through a layer; may refuse it."""

    def view(self, param: Tensor) -> Tensor | None:
        """Where the gradients [N, *param.shape] go; None where they come in a tensor of their own.

        That is the case for a frozen parameter, and for one used before in this batch.
        """

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        """Keep the factors of the gradients ``Σ_t g[n,t]ᵀ x[n,t]`` of a matrix, not the gradients.

        False where they are to be formed now.
        """

    def record(self, param: Tensor, grads: Tensor) -> None:
        """Take the gradients of one use of ``param``; what was not written to its view is added."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast would compute a layer with input ``x``, or that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def as_written(x: Tensor) -> Iterator[None]:
    """Inside, operations run in the types of their arguments, whatever autocast says."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield
