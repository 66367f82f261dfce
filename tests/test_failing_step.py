"""A step that fails at any place leaves nothing of its logical batch: no record counts twice."""

import pytest
import torch
from torch import nn

from dpengine import Adaptive, Capture, DPOptimizer, PrivacyError, clipping, noise
from dpengine.slab import SeparateGrads

BOUND = 0.5


def private(mode=None, sigma=0.0) -> tuple[nn.Module, DPOptimizer]:
    module = nn.Linear(3, 1, bias=False).train()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(module).parameters, lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=BOUND,
        expected_batch_size=1.0,
        loss_reduction="sum",
        clipping=mode,
    )
    return module, optimizer


def backward(module, optimizer) -> None:
    optimizer.zero_grad()
    (10 * module(torch.ones(1, 3))).sum().backward()


class OutOfMemory(Exception):
    pass


def fail(*_, **__):
    raise OutOfMemory


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (DPOptimizer, "_check_params"),
        (DPOptimizer, "_is_last"),
        (Capture, "take"),
        (clipping.Flat, "clip_and_sum"),
        (SeparateGrads, "pack"),
        (Adaptive, "count"),
    ],
    ids=["check", "place", "take", "clip", "add", "count"],
)
@pytest.mark.parametrize("is_second", [False, True])
def test_a_loop_that_catches_an_error_and_goes_on_keeps_the_bound(
    monkeypatch, owner, name, is_second
):
    module, optimizer = private(Adaptive(BOUND, 1.0, learning_rate=0.0))
    before = module.weight.detach().clone()
    if is_second:
        optimizer.signal_skip_step()
        backward(module, optimizer)
        optimizer.step()
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
        patch.setattr(owner, name, fail)
        backward(module, optimizer)
        optimizer.step()
    optimizer._step_skip_queue.clear()
    backward(module, optimizer)
    optimizer.step()
    assert (module.weight - before).norm() <= BOUND * 1.00001


def test_a_sum_whose_noise_failed_cannot_be_noised_again(monkeypatch):
    """The count was noised, and a second answer about it would have no charge."""
    module, optimizer = private(Adaptive(BOUND, 1.0), sigma=1.0)
    backward(module, optimizer)
    answered, noisy_mean = [], noise.noisy_mean

    def fails_for_the_sum(total, *rest):
        if total.values.numel() > 1:
            raise OutOfMemory
        answered.append(total)
        return noisy_mean(total, *rest)

    monkeypatch.setattr(noise, "noisy_mean", fails_for_the_sum)
    with pytest.raises(OutOfMemory):
        optimizer.step()
    monkeypatch.setattr(noise, "noisy_mean", noisy_mean)
    for again in (optimizer.add_noise, optimizer.step):
        with pytest.raises(PrivacyError):
            again()
    assert len(answered) == 1
    backward(module, optimizer)
    optimizer.step()  # the next logical batch is one of its own
