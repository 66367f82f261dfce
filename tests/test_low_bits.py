"""No artefact of training holds bits of a sum that the noise does not cover."""

import copy
import os

import pytest
import torch
from torch import Tensor

from dpengine import Capture, DPOptimizer
from dpengine.mechanism import noise
from dpengine.optim.update import AdamWBC, Identity, Lamb, LaplacianSmoothing, LowPass
from dpengine.optim.update.average import WeightAverage

NOISY_MEAN = noise.noisy_mean
SIGMA, BOUND, EXPECTED = 0.7, 0.6, 3.0


def artefacts(make_optimizer, make_filter) -> dict[str, object]:
    """All that three steps leave: weights, gradients, optimizer and filter state, average."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Linear(6, 5).train()
    capture = Capture(module)
    optimizer = DPOptimizer(
        make_optimizer(capture.parameters),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=EXPECTED,
        filter=make_filter(),
    )
    average = WeightAverage(capture.parameters, 0.9)
    for number in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        module(x).square().sum(1).mean().backward()
        optimizer.step()
        average.update()
        gradients = [param.grad.clone() for param in capture.parameters]
        optimizer.zero_grad()
    return {
        "weights": [param.detach().clone() for param in capture.parameters],
        "gradients": gradients,
        "optimizer": copy.deepcopy(optimizer.original_optimizer.state_dict()),
        "filter": copy.deepcopy(optimizer.filter.state_dict()),
        "average": average.tensors,
    }


def bits(value: object) -> list:
    if isinstance(value, Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, dict):
        return [bits(item) for item in value.values()]
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return [value]


@pytest.mark.parametrize(
    "make_filter",
    [Identity, lambda: LowPass(0.5), lambda: LaplacianSmoothing(1.0)],
    ids=["no filter", "low-pass", "laplacian"],
)
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: AdamWBC(params, lr=0.1, noise_variance=0.01, floor=1e-3),
        lambda params: Lamb(params, lr=0.1),
    ],
    ids=["sgd", "adamw", "adamw-bc", "lamb"],
)
def test_every_artefact_is_a_function_of_values_on_a_public_grid(
    monkeypatch, make_optimizer, make_filter
):
    """Rounding to the grid what the mechanism gives, before anything sees it, changes no bit."""
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    as_they_are = artefacts(make_optimizer, make_filter)
    step = 2.0**-10  # σ C = 0.42

    def rounded(*args) -> Tensor:
        return ((NOISY_MEAN(*args) * EXPECTED) / step).round() * step / EXPECTED

    monkeypatch.setattr(noise, "noisy_mean", rounded)
    on_the_grid = artefacts(make_optimizer, make_filter)
    for name, value in as_they_are.items():
        assert bits(value) == bits(on_the_grid[name]), name
