"""What a captured module carries: calls that lead into its capture, and which capture that is.

Copies and pickles of a captured module are ordinary modules: a copy for evaluation or for an
average is never part of a batch. To train a copy privately, capture it.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_HOLDERS = WeakTensorKeyDictionary()
"""A weak reference to the Capture that holds the slots of a trainable parameter."""


class Rerouted:
    """Stands in for the forward of ``module``; in a copy it is the module's own again."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple:
        # Restored while the copy has no attributes yet, so it finds the forward of its class.
        return getattr, (self._module, "forward")


class Hook:
    """A hook of a module that does nothing in a copy of it."""

    def __init__(self, hook: Callable[..., Any] = lambda *args: None) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __reduce__(self) -> tuple:
        return Hook, ()


def hold(params: list[nn.Parameter], capture: Any) -> None:
    """Say that ``capture`` holds the slots of ``params``, until ``give_up``."""
    for param in params:
        _HOLDERS[param] = weakref.ref(capture)


def give_up(params: list[nn.Parameter]) -> None:
    """Say that nothing holds the slots of ``params`` any more."""
    for param in params:
        del _HOLDERS[param]


def of(params: list[Tensor]) -> Any | None:
    """The Capture that holds the slots of all ``params``, if there is one and only one."""
    references = {_HOLDERS.get(param) for param in params}
    reference = references.pop() if len(references) == 1 else None
    return reference() if reference is not None else None
