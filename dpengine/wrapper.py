"""An optimizer around another one, whose groups, state and defaults are the inner one's."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import PrivacyError, positive


class Charges(Protocol):
    """Counts what was charged; loading a state adds to it and never lowers a count."""

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


def _nothing() -> None:
    pass


def _refuse_charges(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    if "charges" in state_dict:
        raise PrivacyError(
            "the state is of training that was charged, and nothing here counts what it cost; "
            "load it into the optimizer that a PrivacyEngine's make_private returned"
        )


class OptimizerWrapper(Optimizer):
    """Shares groups, state and state_dict with ``original_optimizer``, which schedulers may hold.

    charges: what counts the cost of its steps, where that is not a ledger. Its state goes into the
    optimizer's, so that whoever goes on from one knows what it cost.

    Hooks around ``step`` are the wrapper's; those around state_dict are the inner optimizer's. The
    inner optimizer from now on refuses gradients that are not marked as noised.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer
        self.charges: Charges | None = None
        self.step_hook: Callable[[Any], None] | None = None
        self.public_loss: Callable[[], Tensor] | None = None
        state = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = state
        self._guard()

    def _guard(self) -> None:
        self.original_optimizer.register_step_pre_hook(_refuse_ordinary_grads)
        self.original_optimizer.register_load_state_dict_pre_hook(_refuse_charges)

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

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Call ``fn(self)`` after noise was added and before the weights are updated."""
        self.step_hook = fn

    def attach_public_loss(self, fn: Callable[[], Tensor]) -> None:
        """Add the gradient of ``fn()``, a loss of public rows alone, to every noised gradient.

        As for the class images of DreamBooth's prior preservation, which are no records: ``fn``
        takes its own rows, as many in every update, calls the module on them, and returns their
        loss times a constant. It runs once for each noised update, and the gradient is neither
        clipped nor noised: its weight is against a noisy mean whose records are clipped to C.

        Guarantee: that of the noised sum. ``fn`` sees the weights, made of noised sums, and public
        rows whose number and choice are its own, and no record's gradient or slot; nor does the
        size of a batch, or in how many pieces it came, change how often it runs. So the update is
        post-processing of what the mechanism released, whatever the public gradient is. Private
        rows, their losses and their number must not be used in ``fn``: nothing can see that.
        """
        if not callable(fn):
            raise TypeError(f"fn must be a function that returns a loss, got {type(fn).__name__}")
        self.public_loss = fn

    def train(self) -> None:
        """Tell a schedule-free optimizer that training goes on; others have no such mode."""
        getattr(self.original_optimizer, "train", _nothing)()

    def eval(self) -> None:
        """Have a schedule-free optimizer put the averaged weights in place of those it trains."""
        getattr(self.original_optimizer, "eval", _nothing)()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and what it cost: no sum, no noise, no random state."""
        state = self.original_optimizer.state_dict()
        return state if self.charges is None else {**state, "charges": self.charges.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state, and add what it cost to the charges.

        Raises PrivacyError, with nothing changed, where one has charges and the other has none.
        """
        rest = dict(state_dict)
        charges = rest.pop("charges", None)
        if self.charges is None:
            _refuse_charges(self, state_dict)
        if charges is None and self.charges is not None and rest["state"]:
            raise PrivacyError(
                "the state does not tell what it cost; save the state_dict() of the optimizer that "
                "make_private returned, or load one of training on public data alone into the "
                "inner optimizer, before make_private"
            )
        if charges is not None:
            self.charges.load_state_dict(charges)
        self.original_optimizer.load_state_dict(rest)

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

    _step_supports_amp_scaling = True
    """So that torch's GradScaler comes here, and does not look for gradients in vain."""

    def _refuse_scaler(self, scale: Tensor) -> None:
        raise PrivacyError(
            "a GradScaler moves its scale by the overflows of private records, and drops those; "
            "multiply the loss by a public constant, as DPOptimizer(loss_scale=1024), or use bf16"
        )

    grad_scale = property(fset=_refuse_scaler)

    def __repr__(self) -> str:
        return repr(self.original_optimizer)


def check_arguments(optimizer: Optimizer, generator: object) -> None:
    """Raise for an optimizer that cannot be made private, and for a seeded generator."""
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError("the optimizer is private already; give its original_optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates a batch several times in a step: choose another optimizer")
    if generator is not None:
        raise ValueError(
            "generator must be None: whoever knows its seed can subtract the noise; leave it out, "
            "the operating system keys the noise"
        )


def check_divisor(
    expected_batch_size: float | None, loss_reduction: str, is_adaptive: bool
) -> None:
    """Raise ValueError for a reduction that is none, and where a divisor is needed and missing."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
    if expected_batch_size is not None:
        positive(expected_batch_size=expected_batch_size)
    elif loss_reduction == "mean" or is_adaptive:
        raise ValueError(
            "expected_batch_size must be a number where the loss is a mean or clipping is "
            "adaptive, got None; give sampling rate times public dataset size"
        )
