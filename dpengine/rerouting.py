"""What a captured module carries: calls that lead into its capture, and out of it in a copy.

Copies and pickles of a captured module are ordinary modules: a copy for evaluation or for an
average is never part of a batch. To train a copy privately, capture it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


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
