"""An optimizer around another one, whose groups, state and defaults are the inner one's."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import PrivacyError


class Charges(Protocol):
    """What counts charged steps; a PrivacyEngine's accountant is one."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def mark_noised(params: Iterable[Tensor]) -> None:
    """Say of the gradients of ``params``, as they are now, that they are noised."""
    for param in params:
        if param.grad is not None:
            param.grad._noised_at = param.grad._version


def _refuse_ordinary_grads(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            grad = param.grad
            if grad is not None and getattr(grad, "_noised_at", None) != grad._version:
                raise PrivacyError(
                    "the optimizer of a DPOptimizer was to apply a gradient that is not noised, or "
                    "that was changed since: call zero_grad() after each step and the "
                    "DPOptimizer's step(), change noised gradients in attach_step_hook or by a "
                    "filter, and make another optimizer for training without privacy"
                )


class OptimizerWrapper(Optimizer):
    """Shares groups, state and state_dict with ``original_optimizer``, which schedulers may hold.

    Hooks around ``step`` are the wrapper's; those around state_dict are the inner optimizer's. The
    inner optimizer from now on refuses gradients that are not marked as noised.

    charges: what counts the steps, if anything does; its state goes wherever the optimizer's goes,
    so that weights which are trained on never lose what they have cost.
    """

    charges: Charges | None = None

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer
        state = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = state
        self._guard()

    def _guard(self) -> None:
        self.original_optimizer.register_step_pre_hook(_refuse_ordinary_grads)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> dict[Any, Any]:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and `charges`: no sum, no noise, no random state."""
        state = dict(self.original_optimizer.state_dict())
        if self.charges is not None:
            state["charges"] = self.charges.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state, and add the charges that it was trained under.

        Raises PrivacyError, with nothing changed, where charges would be lost: where a state that
        was trained has none and an engine counts them, and where no engine counts those it has.
        """
        charges = state_dict.get("charges")
        if charges is None and self.charges is not None and state_dict.get("state"):
            raise PrivacyError(
                "the optimizer's state has no charges, so what its training cost is unknown: load "
                "what this optimizer's state_dict() or the engine's save_checkpoint gave; a state "
                "of public training goes into optimizer.original_optimizer"
            )
        if charges is not None and self.charges is None:
            raise PrivacyError(
                "the optimizer's state has the charges of a PrivacyEngine, and this optimizer has "
                "no engine to count them: load it into the optimizer that make_private returned"
            )
        if charges is not None:
            self.charges.load_state_dict(charges)
        own = {name: value for name, value in state_dict.items() if name != "charges"}
        self.original_optimizer.load_state_dict(own)

    def register_state_dict_pre_hook(
        self, hook: Callable[..., None], prepend: bool = False
    ) -> RemovableHandle:
        return self.original_optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        return self.original_optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        return self.original_optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., None], prepend: bool = False
    ) -> RemovableHandle:
        return self.original_optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __repr__(self) -> str:
        return repr(self.original_optimizer)
