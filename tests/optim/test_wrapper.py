"""The inner optimizer applies noised gradients, or none."""

import copy

import pytest
import torch
from torch import nn

from dpengine import Capture, DPOptimizer, PrivacyError
from dpengine.optim.wrapper import OptimizerWrapper


def private():
    module = nn.Linear(3, 1).train()
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    Capture(module)
    optimizer = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4.0)
    return module, optimizer


def ordinary_backward(module):
    module.eval()(torch.full((2, 3), 1e6)).sum().backward()
    module.train()


def weights(module):
    return [param.detach().clone() for param in module.parameters()]


def test_a_backward_pass_after_the_noise_is_refused():
    module, optimizer = private()
    module(torch.ones(4, 3)).mean().backward()
    assert optimizer.pre_step()
    before = weights(module)
    ordinary_backward(module)
    with pytest.raises(PrivacyError, match="not noised, or that was changed"):
        optimizer.original_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_gradients_that_never_were_noised_are_refused():
    module, optimizer = private()
    ordinary_backward(module)
    with pytest.raises(PrivacyError, match="not noised"):
        optimizer.original_optimizer.step()


def test_what_a_step_hook_makes_of_noised_gradients_is_applied():
    module, optimizer = private()

    def twice(of):
        for param in of.params:
            param.grad.mul_(2)

    optimizer.attach_step_hook(twice)
    before = weights(module)
    module(torch.ones(4, 3)).mean().backward()
    optimizer.step()
    for old, param in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(old - param, param.grad)


def test_two_halves_of_a_step_are_a_step():
    module, optimizer = private()
    before = weights(module)
    module(torch.ones(4, 3)).mean().backward()
    optimizer.pre_step()
    optimizer.original_optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_inner_optimizer_of_a_copy_is_guarded_too():
    module, optimizer = private()
    module, optimizer = copy.deepcopy((module, optimizer))
    ordinary_backward(module)
    with pytest.raises(PrivacyError, match="not noised"):
        optimizer.original_optimizer.step()


class ScheduleFree(torch.optim.SGD):
    """Trains other weights than it evaluates, and has to be told which are wanted."""

    mode = None

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_of_a_schedule_free_optimizer_is_passed_on(mode):
    param = nn.Parameter(torch.zeros(2))
    inner = ScheduleFree([param], lr=0.1)
    getattr(OptimizerWrapper(inner), mode)()
    assert inner.mode == mode
    getattr(OptimizerWrapper(torch.optim.SGD([param], lr=0.1)), mode)()
