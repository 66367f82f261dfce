"""AdamW without the bias that DP noise puts into the second moment."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import not_negative, positive
from .moments import Moments, advance, check_group


class AdamWBC(Optimizer):
    """DP-AdamBC with decoupled weight decay: ``x ← (1 - ηλ) x - η m̂ / √max(v̂ - Φ, γ′)``.

    DP noise of variance Φ in a gradient adds Φ to the expected v̂, so that DP-Adam divides all
    elements by nearly the same number; v̂ - Φ has the expectation of the noise-free v̂.

    noise_variance: Φ, variance of the DP noise in each element of the gradients of the group,
        ``(noise_multiplier · sensitivity / expected_batch_size)²``, times ``variance_gain`` of a
        filter in between. A public number. It may be set anew before any step, in
        ``param_groups``: what is subtracted is its moving average, weighted over the steps as v̂.
    floor: γ′, in units of a squared gradient. Elements below it move as under SGD with momentum and
        step size η / √γ′. Where noise is much larger than the signal, v̂ - Φ is off by a standard
        deviation that falls to ``Φ √(2 (1 - β₂) / (1 + β₂))``; a floor far below that lets noise
        choose the step.
    lr η, betas, weight_decay λ: as in ``torch.optim.AdamW``. There is no ``eps``: γ′ does its work.

    With noise_variance 0 the update is that of ``torch.optim.AdamW`` with ``eps=0``, up to
    rounding, for every element with v̂ >= floor.

    State of each parameter: numbers ``step`` and ``exp_avg_noise``, tensors ``exp_avg`` and
    ``exp_avg_sq`` in the parameter's dtype, which is to be float32 or wider: in bfloat16 a moving
    average stands still. Raises ValueError for a number outside its range.

    Free of privacy cost: it sees noised gradients and public numbers. Source: Tang, Shpilevskiy and
    Lécuyer, arXiv 2312.14334; decoupled weight decay of Loshchilov and Hutter, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        noise_variance: float,
        floor: float,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "noise_variance": noise_variance,
            "floor": floor,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own. Raises ValueError for one out of range."""
        group = self.defaults | param_group
        check_group(group)
        not_negative(noise_variance=group["noise_variance"])
        positive(floor=group["floor"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            not_negative(noise_variance=group["noise_variance"])
            moments = advance(group, self.state)
            if moments is not None:
                _update(group, moments)
        return loss


def _update(group: dict[str, Any], moments: Moments) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if group["weight_decay"]:
        torch._foreach_mul_(moments.params, 1 - lr * group["weight_decay"])
    corrections1 = moments.bias_corrections(beta1)
    corrections2 = moments.bias_corrections(beta2)
    # √(max(v̂ - Φ, γ′) (1 - β₂ᵗ)), so that the last factor is a number and not a tensor's.
    divisors: list[Tensor] = torch._foreach_sub(
        moments.exp_avg_sqs, _average_noise(moments, beta2, group["noise_variance"])
    )
    torch._foreach_clamp_min_(divisors, [group["floor"] * c for c in corrections2])
    torch._foreach_sqrt_(divisors)
    step_sizes = [
        -lr * math.sqrt(c2) / c1 for c1, c2 in zip(corrections1, corrections2, strict=True)
    ]
    torch._foreach_addcdiv_(moments.params, moments.exp_avgs, divisors, step_sizes)


def _average_noise(moments: Moments, beta2: float, noise_variance: float) -> list[float]:
    """The share of noise in each second moment, before the correction of its start at zero."""
    for state in moments.states:
        state["exp_avg_noise"] = (
            beta2 * state.get("exp_avg_noise", 0.0) + (1 - beta2) * noise_variance
        )
    return [state["exp_avg_noise"] for state in moments.states]
