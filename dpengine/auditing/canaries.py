"""Records whose gradients are orthogonal, in the path that every private run takes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..capture import Capture
from ..mechanism.plan import PrivacyPlan
from ..optim import DPOptimizer

MAX_GRAD_NORM = 0.5
"""C of an audit. Not 1, so that noise that forgot to be multiplied by it would show."""

_N_LAYERS = 4
_LEAST = 64
_NORMS = (1.0, 3.0, 100.0, 1e4)
"""Norms of the gradients before clipping, in units of C, from one record to the next."""


def check_number_of_canaries(n_canaries: int) -> None:
    """Raise ValueError unless it fits the layers, and coins leave some in and some out."""
    if n_canaries < _LEAST or n_canaries % _N_LAYERS:
        raise ValueError(
            f"the number of canaries must be a multiple of {_N_LAYERS} and at least {_LEAST}, "
            f"got {n_canaries}"
        )


class Canaries(nn.Module):
    """``n`` records, the gradient of record j along axis j alone: their sum keeps them apart.

    Several layers, so that each of several tensors must get its noise. The model is linear: the
    gradients do not depend on the weights.
    """

    def __init__(self, n_canaries: int, device: str = "cpu") -> None:
        check_number_of_canaries(n_canaries)
        super().__init__()
        size = n_canaries // _N_LAYERS
        layers = [nn.Linear(size, 1, bias=False, device=device) for _ in range(_N_LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.n_canaries, self.device = n_canaries, device
        self.take()

    def forward(self, rows: Tensor) -> Tensor:
        """[n, D] -> [n, 1]"""
        pieces = rows.chunk(_N_LAYERS, dim=1)
        return sum(layer(piece) for layer, piece in zip(self.layers, pieces, strict=True))

    def rows(self, chosen: np.ndarray, n_slots: int) -> Tensor:
        """The rows of the canaries ``chosen``; those of padding would show.  float32 [n_slots, D]

        Padding repeats canary 0: where it were not masked, axis 0 would move.
        """
        axes = np.zeros(n_slots, dtype=np.int64)
        axes[: len(chosen)] = chosen
        sizes = MAX_GRAD_NORM * np.array(_NORMS, dtype=np.float32)[axes % len(_NORMS)]
        rows = torch.zeros(n_slots, self.n_canaries)
        rows[torch.arange(n_slots), torch.from_numpy(axes)] = torch.from_numpy(sizes)
        return rows.to(self.device)

    @torch.no_grad()
    def take(self) -> Tensor:
        """The weights, which become 0 again: float32 does not round what is added to 0.  [D]"""
        weights = torch.cat([layer.weight.flatten() for layer in self.layers])
        for layer in self.layers:
            layer.weight.zero_()
        return weights.double()


@dataclass(frozen=True)
class Engine:
    """The public API around canaries, with a fresh key of the noise."""

    canaries: Canaries
    capture: Capture
    optimizer: DPOptimizer
    divisor: float

    @classmethod
    def of(cls, plan: PrivacyPlan, device: str) -> "Engine":
        """An engine that runs ``plan``, with a canary for each of its trainable parameters."""
        canaries = Canaries(plan.trainable_parameters, device).train()
        capture = Capture(canaries)
        optimizer = DPOptimizer(
            torch.optim.SGD(canaries.parameters(), lr=1.0),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
        )
        return cls(canaries, capture, optimizer, plan.expected_batch_size)

    def step(self, chosen: np.ndarray, n_slots: int) -> None:
        """Forward, backward and step of one physical batch; its sampler has announced it."""
        self.canaries(self.canaries.rows(chosen, n_slots)).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def released(self) -> Tensor:
        """What the last update did to the weights, as a noisy sum in units of C.  float64 [D]

        With a learning rate of 1 it is the noisy mean with its sign changed.
        """
        return -self.canaries.take() * (self.divisor / MAX_GRAD_NORM)
