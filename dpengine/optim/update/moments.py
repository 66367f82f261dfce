"""Moving averages of gradients and of their squares, as Adam keeps them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import not_negative


@dataclass(frozen=True)
class Moments:
    """The parameters of a group that have a gradient, and their state: lists in one order."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def bias_corrections(self, beta: float) -> list[float]:
        """``1 - βᵗ``, t the number of steps that each parameter has made."""
        return [1 - beta ** state["step"] for state in self.states]


def advance(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> Moments | None:
    """Take the gradients of ``group`` into the moving averages; None where there is no gradient.

    ``m ← β₁ m + (1 - β₁) g`` and ``v ← β₂ v + (1 - β₂) g²``, in place, in the parameters' dtype
    (Kingma and Ba, arXiv 1412.6980, Algorithm 1). The step count is a number for each parameter:
    one that had no gradient at first has made fewer steps.
    """
    beta1, beta2 = group["betas"]
    params = [param for param in group["params"] if param.grad is not None]
    if not params:
        return None
    grads = [param.grad for param in params]
    states = [state[param] for param in params]
    for param, values in zip(params, states, strict=True):
        if not values:
            values["step"] = 0
            values["exp_avg"] = torch.zeros_like(param)
            values["exp_avg_sq"] = torch.zeros_like(param)
        values["step"] += 1
    exp_avgs = [values["exp_avg"] for values in states]
    exp_avg_sqs = [values["exp_avg_sq"] for values in states]
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    return Moments(params, states, exp_avgs, exp_avg_sqs)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a learning rate, weight decay or β outside its range."""
    not_negative(lr=group["lr"], weight_decay=group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, Iterable) or len(tuple(betas)) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
