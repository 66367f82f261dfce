"""Weights of linear layers clipped without a gradient for each record."""

import copy
import math

import pytest
import torch
from torch import nn

from dpengine import Capture, DPOptimizer
from dpengine.mechanism.adaptive import Adaptive
from dpengine.mechanism.batches import Product
from dpengine.mechanism.clipping import Automatic, Flat, PerLayer

N, K, C = 6, 3, 0.05
MODES = (Flat(C), PerLayer(C), Automatic(C), Adaptive(C, count_noise_stddev=1.0))


class Model(nn.Module):
    """A convolution, a wide layer whose Gram matrices are small, and a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.wide = nn.Linear(12, 64)
        self.narrow = nn.Linear(64, 2)

    def forward(self, x):
        return self.narrow(self.wide(self.conv(x).flatten(1)).tanh())


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().train()


def rows() -> torch.Tensor:
    return torch.randn(N * K, 2, 4, generator=torch.Generator().manual_seed(1))


def losses(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x).square().sum(1)


def update(mode, norm_only: bool) -> torch.Tensor:
    """What one step without noise takes from the weights."""
    net = model()
    params = list(net.parameters())
    Capture(net, draws_per_record=K, norm_only=norm_only)
    optimizer = DPOptimizer(
        torch.optim.SGD(params, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=N,
        clipping=mode,
    )
    before = nn.utils.parameters_to_vector(params).detach().clone()
    losses(net, rows()).mean().backward()
    optimizer.step()
    return before - nn.utils.parameters_to_vector(params).detach()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: type(mode).__name__)
def test_the_update_is_that_of_gradients_kept(mode):
    # Weights below 1 are rounded to 2⁻²⁵ in either run.
    torch.testing.assert_close(update(mode, True), update(mode, False), rtol=1e-5, atol=2**-24)


def test_the_flat_update_is_that_of_single_records_in_float64():
    net = copy.deepcopy(model()).double()
    total = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    for record in rows().double().split(K):
        grads = torch.autograd.grad(losses(net, record).mean(), net.parameters())
        flat = torch.cat([grad.flatten() for grad in grads])
        total += flat * min(1.0, C / float(flat.norm()))
    torch.testing.assert_close(update(Flat(C), True).double() * N, total, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width", [16, 512], ids=["product", "gram"])
@pytest.mark.parametrize("kind", ["identical", "orthogonal", "cancelling"])
def test_a_record_of_many_draws_contributes_at_most_the_bound(width, kind):
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 1, width, generator=generator)
    if kind == "identical":
        left = right = first.expand(8, width)
    elif kind == "orthogonal":
        left, right = torch.eye(8, width), torch.eye(8, width).flip(0)
    else:  # the product is the rounding that is left of numbers near 1e12
        left = 1e6 * torch.cat([first, -first, second, -second] * 2)
        right = 1e6 * torch.cat([second, second, first, first] * 2)
        left[0, 0] += 1
    product = Product(left, right, n_records=1)
    clipped = Flat(C).clip_and_sum([product], torch.ones(1, dtype=torch.bool))
    assert float(clipped.values.norm()) <= C
    if kind != "cancelling":
        assert float(clipped.values.norm()) > 0.99 * C


def test_a_bad_record_contributes_nothing_and_changes_no_bit():
    left, right = torch.randn(2, N, 5, generator=torch.Generator().manual_seed(3))
    everyone = torch.ones(N, dtype=torch.bool)
    without = Flat(C).clip_and_sum([Product(left, right, N)], everyone & (torch.arange(N) != 2))
    left[2, 1] = math.nan
    assert torch.equal(
        Flat(C).clip_and_sum([Product(left, right, N)], everyone).values, without.values
    )


def test_no_gradient_of_a_matrix_is_kept():
    net = model()
    capture = Capture(net, draws_per_record=K, norm_only=True)
    losses(net, rows()).mean().backward()
    batch = capture.take()
    kept = [grads for grads in batch.grads.whole if isinstance(grads, torch.Tensor)]
    assert max(grads[0].numel() for grads in kept) < net.wide.weight.numel()


def test_a_second_use_of_a_weight_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(self.layer(x))

    net = Twice().train()
    Capture(net, norm_only=True)
    with pytest.raises(ValueError, match=r"\(5, 5\) is used twice.*leave norm_only.*out"):
        net(torch.randn(4, 5)).sum().backward()
