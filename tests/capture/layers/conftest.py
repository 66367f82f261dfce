"""The oracle of the layers' tests: single records, one ordinary backward pass each, in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dpengine import Capture
from dpengine.capture.slots import SeparateGrads, Slab
from dpengine.mechanism.clipping import Flat


def _losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(left, right, strict=True)]
    return float(sum(squares)) ** 0.5


def _to_double(rows: list[Tensor]) -> list[Tensor]:
    return [row.double() if row.is_floating_point() else row for row in rows]


@dataclass(frozen=True)
class Oracle:
    """A module, its inputs with rows first, and how it is called.

    ``call``: (module, *rows) -> one tensor with rows first; everything else is its own matter.
    """

    module: nn.Module
    rows: list[Tensor]
    draws: int
    call: Callable[..., Tensor]

    def target(self) -> Tensor:
        with torch.no_grad():
            shape = self.call(self.module, *self.rows).shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))

    def backward(
        self, module: nn.Module, rows: list[Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, loss, and leaves for the input gradients."""
        rows = [r.clone().requires_grad_() if r.is_floating_point() else r for r in rows]
        output = self.call(module, *rows)
        leaves = [row for row in rows if row.is_floating_point()]
        return output, _losses(output, target).sum() / self.draws, leaves

    def alone(
        self, module: nn.Module, rows: list[Tensor], target: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Outputs, input gradients and per-record gradients, one record at a time."""
        params = [param for param in module.parameters() if param.requires_grad]
        outputs, inputs, grads = [], [], []
        for start in range(0, len(target), self.draws):
            own = slice(start, start + self.draws)
            output, loss, leaves = self.backward(module, [r[own] for r in rows], target[own])
            found = torch.autograd.grad(
                loss, [*leaves, *params], allow_unused=True, materialize_grads=True
            )
            outputs.append(output.detach())
            inputs.append(found[: len(leaves)])
            grads.append(found[len(leaves) :])
        return (
            [torch.cat(outputs)],
            [torch.cat(column) for column in zip(*inputs, strict=True)],
            [torch.stack(column) for column in zip(*grads, strict=True)],
        )

    def captured(self, holder: type, target: Tensor):
        """The same from one backward pass through the captured module."""
        capture = Capture(self.module, draws_per_record=self.draws)
        capture._holder = partial(holder, capture.layout)
        try:
            output, loss, leaves = self.backward(self.module, self.rows, target)
            loss.backward()
            batch = capture.take()
            grads = [grad.clone() for grad in batch.per_record_grads]
        finally:
            capture.detach()
        assert type(batch.grads) is holder
        assert all(param.grad is None for param in self.module.parameters())
        inputs = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        return [output.detach()], inputs, grads


@pytest.fixture
def compare():
    """Assert that output, input gradients and per-record gradients are those of single records.

    All tensors together, at most twice as wrong as float32 backward passes over single records;
    every tensor has a gradient in each record, but for the names in ``unused``.
    """

    def run(module, *rows, draws=1, call=None, unused=()) -> list[Tensor]:
        oracle = Oracle(module, list(rows), draws, call or (lambda module, *rows: module(*rows)))
        target = oracle.target()
        exact = oracle.alone(copy.deepcopy(module).double(), _to_double(rows), target.double())
        eager = oracle.alone(module, list(rows), target)
        trained = [name for name, param in module.named_parameters() if param.requires_grad]
        for name, grad in zip(trained, exact[2], strict=True):
            assert ((grad.reshape(len(grad), -1).norm(dim=1) == 0) == (name in unused)).all(), name
        for holder in (SeparateGrads, Slab):
            ours = oracle.captured(holder, target)
            for what, a, b, c in zip(("output", "input", "grads"), ours, eager, exact, strict=True):
                assert [x.shape for x in a] == [x.shape for x in c], what
                wrong, allowed = _distance(a, c), 2 * _distance(b, c)
                assert wrong <= allowed, f"{what} in {holder.__name__}: {wrong} > {allowed}"
        return ours[2]

    return run


@pytest.fixture
def randomized():
    """Set the trainable tensors to normal values: LoRA's B, biases and scales too."""

    def run(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for param in module.parameters():
                if param.requires_grad:
                    scale = max((1, *param.shape)) ** -0.5
                    param.add_(scale * torch.randn(param.shape, generator=generator))
        return module.train()

    return run


@pytest.fixture
def rows():
    """Rows of standard normals."""

    def run(*shape: int, seed: int = 3) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return run


@pytest.fixture
def contribution():
    """What record 0 adds to the clipped sum of N records, in L2 norm, by two ways to keep it.

    Its rows' losses are linear, so that draws may cancel. Its own size is ``scale``.
    """

    def run(module, *rows, draws, kind, scale, max_grad_norm, call=None) -> list[float]:
        call = call or (lambda module, *rows: module(*rows))
        rows = [row.clone() for row in rows]
        for row in rows:
            if kind != "orthogonal":
                row[:draws] = row[:1]
        with torch.no_grad():
            weights = torch.randn(
                call(module, *rows).shape, generator=torch.Generator().manual_seed(5)
            )
        _set_draws(weights[:draws], kind, scale)
        found = []
        for holder in (SeparateGrads, Slab):
            capture = Capture(module, draws_per_record=draws)
            capture._holder = partial(holder, capture.layout)
            (call(module, *rows) * weights).sum().backward()
            batch = capture.take()
            capture.detach()
            assert type(batch.grads) is holder
            sums = []
            for first in (True, False):
                kept = batch.is_record.clone()
                kept[0] = first
                clipped = Flat(max_grad_norm).clip_and_sum(batch.grads.whole, kept)
                sums.append(batch.grads.pack(clipped.values))
            found.append(float((sums[0] - sums[1]).norm()))
        return found

    return run


def _set_draws(weights: Tensor, kind: str, scale: float) -> None:
    """[K, ...] in place: the gradients at the output of the K draws of one record."""
    if kind == "identical":
        weights[:] = scale * weights[:1]
    elif kind == "orthogonal":  # no two draws touch the same element of the output
        element = torch.arange(weights[0].numel()).view(weights[0].shape) % len(weights)
        for k in range(len(weights)):
            weights[k] = scale * weights[k] * (element == k)
    else:  # the draws cancel but for one part in 1e7
        weights[0] = scale * weights[0]
        weights[1:] = -weights[0] / (len(weights) - 1)
        weights[-1] *= 1 + 2**-20
