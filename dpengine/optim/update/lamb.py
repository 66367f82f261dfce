"""LAMB: Adam whose step is as long, for each tensor, as a given share of its weights' norm."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import positive
from .moments import Moments, advance, check_group


class Lamb(Optimizer):
    """LAMB, for very large batches: ``x ← x - η (‖x‖ / ‖u‖) u``, ``u = m̂ / (√v̂ + ε) + λ x``.

    The trust ratio ``‖x‖ / ‖u‖`` is one number for each tensor, and 1 where either norm is 0: a
    LoRA's ``lora_b`` starts at zero. From then on the norm of a tensor grows at most by the factor
    ``1 + η`` a step, so that a tensor that starts at zero wants a large η or many steps.

    lr η, betas, eps ε, weight_decay λ: as in ``torch.optim.AdamW``; the decay is part of u, outside
    the moments. All parameters of a group are on one device.

    State of each parameter: number ``step``, tensors ``exp_avg`` and ``exp_avg_sq`` in the
    parameter's dtype. Raises ValueError for a number outside its range.

    Free of privacy cost: it sees noised gradients, the weights that came of them, and public
    numbers. Source: You et al., arXiv 1904.00962, Algorithm 2, with φ the identity.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError for one out of range."""
        group = self.defaults | param_group
        check_group(group)
        positive(eps=group["eps"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moments = advance(group, self.state)
            if moments is not None:
                directions = _directions(group, moments)
                ratios = _trust_ratios(moments.params, directions)
                torch._foreach_mul_(directions, ratios)
                torch._foreach_add_(moments.params, directions, alpha=-group["lr"])
        return loss


def _directions(group: dict[str, Any], moments: Moments) -> list[Tensor]:
    """``m̂ / (√v̂ + ε) + λ x`` for each parameter."""
    beta1, beta2 = group["betas"]
    roots2 = [math.sqrt(c) for c in moments.bias_corrections(beta2)]
    # Both corrections are numbers of a tensor: taken out of the quotient they cost one pass.
    divisors = torch._foreach_sqrt(moments.exp_avg_sqs)
    torch._foreach_add_(divisors, [group["eps"] * root for root in roots2])
    directions = torch._foreach_div(moments.exp_avgs, divisors)
    corrections1 = moments.bias_corrections(beta1)
    scales = [root / c for root, c in zip(roots2, corrections1, strict=True)]
    torch._foreach_mul_(directions, scales)
    if group["weight_decay"]:
        torch._foreach_add_(directions, moments.params, alpha=group["weight_decay"])
    return directions


def _trust_ratios(params: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """``‖x‖ / ‖u‖``, or 1 where either is 0; they stay on the device."""
    weight_norms = torch.stack(torch._foreach_norm(params))
    direction_norms = torch.stack(torch._foreach_norm(directions))
    defined = (weight_norms > 0) & (direction_norms > 0)
    return list(torch.where(defined, weight_norms / direction_norms, 1.0).unbind())
