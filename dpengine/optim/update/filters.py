"""Filters between the noise and the optimizer.

Each is free of privacy cost: a function of noised gradients alone is post-processing, and no
guarantee is weakened by it (Dwork and Roth, The Algorithmic Foundations of Differential Privacy,
Proposition 2.1). The assumption is that nothing private goes in: the argument is the noised mean
gradient, the state comes of earlier ones, and the options are public numbers.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import not_negative, positive_int


class Filter(Protocol):
    """A map from the noised mean gradient to the gradient that the optimizer sees.

    ``noisy_mean`` float64 [P] -> float64 [P], all parameters in a row. It writes not into its
    argument and returns nothing that its state holds. Its inputs are noised or public; a filter
    that looks at a record, a loss or a per-record gradient voids the guarantee.
    """

    def __call__(self, noisy_mean: Tensor) -> Tensor: ...

    def variance_gain(self, num_values: int) -> float:
        """Variance of white noise in one of ``num_values`` behind the filter, over that before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next calls depend on: tensors and numbers."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the filter that gave ``state_dict``."""
        ...


@dataclass(frozen=True)
class Identity:
    """No filter. Free of privacy cost: it returns the noised mean gradient as it is."""

    def __call__(self, noisy_mean: Tensor) -> Tensor:
        return noisy_mean

    def variance_gain(self, num_values: int) -> float:
        """Variance of the noise in one value behind the filter, over that before it: 1."""
        positive_int(num_values=num_values)
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for a state of another filter."""
        _no_state(self, state_dict)


@dataclass(frozen=True)
class LaplacianSmoothing:
    """Solve ``(I - s L) x = g``, L the periodic second difference over neighbouring values.

    strength: s >= 0, dimensionless; 0 changes nothing. The mean of the values is kept, and the
    k-th frequency is divided by ``1 + 4 s sin²(π k / P)``: O(P log P) by FFT.

    Free of privacy cost: a fixed linear map of the noised mean gradient. Raises ValueError for a
    strength outside its range. Source: Wang et al., DP-LSSGD, arXiv 1906.12056.
    """

    strength: float

    def __post_init__(self) -> None:
        not_negative(strength=self.strength)

    def __call__(self, noisy_mean: Tensor) -> Tensor:
        num_values = noisy_mean.numel()
        spectrum = torch.fft.rfft(noisy_mean)
        half_angles = torch.arange(
            len(spectrum), dtype=noisy_mean.dtype, device=noisy_mean.device
        ).mul_(math.pi / num_values)
        spectrum /= half_angles.sin_().square_().mul_(4 * self.strength).add_(1)
        return torch.fft.irfft(spectrum, n=num_values)

    def variance_gain(self, num_values: int) -> float:
        """Variance of the noise in one value behind the filter, over that before it.

        ``(1/P) Σ_k (1 + 4 s sin²(π k / P))⁻²`` in closed form: with ``a = 1 + 2 s``,
        ``d = √(1 + 4 s)`` and ``q = (2 s / (a + d))ᴾ`` the sum over the periodic images of
        ``(1/P) Σ_k (a - 2 s cos(2 π k / P))⁻¹ = (1 + q) / (d (1 - q))``, differentiated by a.
        """
        positive_int(num_values=num_values)
        a, d = 1 + 2 * self.strength, math.sqrt(1 + 4 * self.strength)
        q = (2 * self.strength / (a + d)) ** num_values
        return a / d**3 * (1 + q) / (1 - q) + 2 * num_values * q / (d * (1 - q)) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for a state of another filter."""
        _no_state(self, state_dict)


class LowPass:
    """Exponential low-pass over the steps: ``Σ_i (1 - d) dᵗ⁻ⁱ g_i / (1 - dᵗ)`` at step t.

    decay: 0 <= d < 1; 0 changes nothing. The weights of the past sum to 1 from the first step on,
    so that a constant gradient passes unchanged. State: the last output, float64 [P].

    Free of privacy cost: a fixed linear map of the noised mean gradients so far. Raises ValueError
    for a decay outside its range. Source: Zhang et al., DOPPLER, arXiv 2408.13460: a low-pass
    filter over the steps with its start corrected; this one is of first order.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self._num_steps = 0
        self._output: Tensor | None = None

    def __call__(self, noisy_mean: Tensor) -> Tensor:
        """Raises ValueError where the number of values is not that of the steps before."""
        if self._output is not None and self._output.shape != noisy_mean.shape:
            raise ValueError(
                f"noisy_mean must have shape {tuple(self._output.shape)} as in the steps before, "
                f"got {tuple(noisy_mean.shape)}; a new set of parameters takes a new filter"
            )
        self._num_steps += 1
        if self._output is None:
            self._output = noisy_mean.clone()
            return noisy_mean
        weight = (1 - self.decay) / (1 - self.decay**self._num_steps)
        self._output = self._output.to(noisy_mean.device).lerp(noisy_mean, weight)
        return self._output.clone()  # `zero_grad(set_to_none=False)` writes into gradients

    def variance_gain(self, num_values: int) -> float:
        """Variance of the noise in one value behind the filter, over that before it.

        For noise of constant variance, fresh in every step, after the last call:
        ``Σ_i w_i² = (1 - d) (1 + dᵗ) / ((1 + d) (1 - dᵗ))``; 1 before the first.
        """
        positive_int(num_values=num_values)
        past = self.decay ** max(self._num_steps, 1)
        return (1 - self.decay) / (1 + self.decay) * (1 + past) / (1 - past)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the last output once there is one."""
        if self._output is None:
            return {"num_steps": 0}
        return {"num_steps": self._num_steps, "output": self._output.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the filter that gave ``state_dict``. Raises ValueError for another's."""
        num_steps, output = state_dict.get("num_steps"), state_dict.get("output")
        if num_steps is None or (output is None) != (num_steps == 0):
            raise ValueError(
                "state_dict must hold `num_steps` and, after the first, `output`, got "
                f"{sorted(state_dict)}; load it into the kind of filter that gave it"
            )
        self._num_steps = num_steps
        self._output = None if output is None else output.clone()


def _no_state(stateless: Filter, state_dict: dict[str, Any]) -> None:
    if state_dict:
        raise ValueError(
            f"state_dict must be empty for {type(stateless).__name__}, got {sorted(state_dict)}; "
            "load it into the kind of filter that gave it"
        )
