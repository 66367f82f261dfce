"""Exponential moving average of the weights: post-processing, free of privacy cost."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Bias-corrected exponential moving average of ``params`` after each step.

    After t steps the weight of step i is ``(1 - d) dᵗ⁻ⁱ / (1 - dᵗ)``: the initial weights have no
    part in it (Kingma and Ba, arXiv 1412.6980, section 3). ``decay`` d = 0 is the last step alone.
    """

    def __init__(self, params: list[nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {decay}")
        self._params = params
        self._decay = decay
        self.tensors: list[Tensor] = [param.detach().clone() for param in params]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after one step."""
        self.num_updates += 1
        weight = (1 - self._decay) / (1 - self._decay**self.num_updates)
        for average, param in zip(self.tensors, self._params, strict=True):
            average.lerp_(param, weight)

    @torch.no_grad()
    def copy_to_params(self) -> None:
        """Put the average in place of the weights."""
        for average, param in zip(self.tensors, self._params, strict=True):
            param.copy_(average)
