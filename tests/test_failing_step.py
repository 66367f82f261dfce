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


def moved(module, before) -> float:
    return float((module.weight.detach() - before).norm())


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
    backward(module, optimizer)
    optimizer.step()
    assert (module.weight - before).norm() <= BOUND * 1.00001


@pytest.mark.parametrize(
    ("owner", "name"), [(Capture, "take"), (DPOptimizer, "_is_last"), (SeparateGrads, "pack")]
)
def test_the_signal_of_a_step_that_failed_is_not_the_next_ones(monkeypatch, owner, name):
    """It would join the next logical batch with the one after it."""
    module, optimizer = private()
    optimizer.signal_skip_step()
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
        patch.setattr(owner, name, fail)
        backward(module, optimizer)
        optimizer.step()
    for _ in range(2):  # two logical batches, which may hold the same record
        before = module.weight.detach().clone()
        backward(module, optimizer)
        optimizer.step()
        assert moved(module, before) == pytest.approx(BOUND, rel=1e-5)
    assert optimizer.num_steps == 2


def test_the_signal_of_a_pass_that_was_given_up_is_not_the_next_ones():
    module, optimizer = private()
    optimizer.signal_skip_step()
    (10 * module(torch.ones(1, 3))).sum().backward()
    optimizer.zero_grad()
    before = module.weight.detach().clone()
    backward(module, optimizer)
    optimizer.step()
    assert moved(module, before) == pytest.approx(BOUND, rel=1e-5) and optimizer.num_steps == 1


def test_signals_of_later_steps_outlive_one_that_failed(monkeypatch):
    module, optimizer = private()
    for do_skip in (True, True, False):
        optimizer.signal_skip_step(do_skip)
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
        patch.setattr(clipping.Flat, "clip_and_sum", fail)
        backward(module, optimizer)
        optimizer.step()
    for num_steps in (0, 1, 2):
        backward(module, optimizer)
        optimizer.step()
        assert optimizer.num_steps == num_steps


def test_a_grad_sample_that_failed_to_be_taken_is_not_in_the_next_sum(monkeypatch):
    """Opacus' module gathers those of several backward passes, which a caught error would join."""
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.grad_sample = torch.full((1, 1, 3), 10.0)
    optimizer = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=1.0,
        loss_reduction="sum",
    )
    before = layer.weight.detach().clone()
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
        patch.setattr(torch, "cat", fail)
        optimizer.step()
    waiting = layer.weight.grad_sample
    layer.weight.grad_sample = [*([] if waiting is None else [waiting]), torch.full((1, 1, 3), 9.0)]
    optimizer.step()
    assert moved(layer, before) == pytest.approx(BOUND, rel=1e-5)


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


def test_a_backward_pass_that_fails_half_way_is_given_up_by_zero_grad():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).train()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(module).parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=1.0,
        loss_reduction="sum",
    )
    handle = module[0].register_forward_hook(lambda m, args, out: out.register_hook(fail) and None)
    loss = module(torch.ones(1, 3)).sum()
    with pytest.raises(OutOfMemory):
        loss.backward()
    handle.remove()
    with pytest.raises(PrivacyError, match="zero_grad"):
        module(torch.ones(1, 3))
    optimizer.zero_grad()
    before = [param.detach().clone() for param in module.parameters()]
    (100 * module(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    moved_by = torch.cat(
        [(p.detach() - b).flatten() for p, b in zip(module.parameters(), before, strict=True)]
    )
    assert float(moved_by.norm()) <= BOUND * 1.00001
