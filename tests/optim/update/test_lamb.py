"""Lamb against Algorithm 2 of the paper, written as a loop over numbers."""

import copy
import math

import pytest
import torch
from torch import nn

from dpengine.optim.update import Lamb
from dpengine.run import checkpoint
from dpengine.run.checkpoint import Checkpoint

SHAPES = ((3, 2), (4,), ())
STEPS = 15


def make_params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def gradients(step, params):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def train(optimizer, params, steps):
    for step in steps:
        for param, grad in zip(params, gradients(step, params), strict=True):
            param.grad = grad
        optimizer.step()


def norm(values):
    return math.sqrt(sum(value * value for value in values))


def lamb(x, grads, *, lr, betas, eps, decay):
    """One tensor under Algorithm 2, in Python's floats."""
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t, grad in enumerate(grads, 1):
        m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, grad, strict=True)]
        v = [betas[1] * a + (1 - betas[1]) * g * g for a, g in zip(v, grad, strict=True)]
        u = [
            a / (1 - betas[0] ** t) / (math.sqrt(b / (1 - betas[1] ** t)) + eps) + decay * c
            for a, b, c in zip(m, v, x, strict=True)
        ]
        ratio = norm(x) / norm(u) if norm(x) and norm(u) else 1.0
        x = [c - lr * ratio * a for c, a in zip(x, u, strict=True)]
    return x


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", [1.0, 0.0], ids=["random start", "zero start"])
def test_it_is_algorithm_2(betas, eps, decay, start):
    params = make_params()
    with torch.no_grad():
        for param in params:
            param.mul_(start)
    before = [param.detach().flatten().tolist() for param in params]
    options = {"lr": 0.05, "betas": betas, "eps": eps}
    train(Lamb(params, **options, weight_decay=decay), params, range(STEPS))
    for i, param in enumerate(params):
        grads = [gradients(t, params)[i].flatten().tolist() for t in range(STEPS)]
        expected = lamb(before[i], grads, **options, decay=decay)
        assert param.flatten().tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_a_step_is_as_long_as_the_learning_rate_times_the_norm_of_the_weights():
    params = make_params()
    optimizer = Lamb(params, lr=0.01)
    for step in range(4):
        before = [param.detach().clone() for param in params]
        train(optimizer, params, [step])
        for param, old in zip(params, before, strict=True):
            length = (param.detach() - old).norm().item()
            assert length == pytest.approx(0.01 * old.norm().item(), rel=1e-10)


def test_a_tensor_of_zeros_starts_as_under_adam():
    """Trust ratio 1: the first step of `lora_b` is lr · sign(g), up to eps."""
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    param.grad = torch.tensor([1.0, -2.0, 3.0, -0.5], dtype=torch.float64)
    Lamb([param], lr=0.1, eps=1e-12).step()
    expected = -0.1 * param.grad.sign()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-11, atol=0)


def test_without_gradient_and_decay_nothing_moves():
    """Trust ratio 1 for an update of norm 0, where the quotient is infinite."""
    params = make_params()
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    Lamb(params, lr=0.1, weight_decay=0).step()
    assert all(map(torch.equal, params, before))


def test_zero_weights_with_zero_gradients_stay_zero():
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.zeros(3)
    Lamb([param], lr=0.1, weight_decay=0.1).step()
    assert param.tolist() == [0, 0, 0]


def test_weight_decay_alone_shrinks_a_tensor_by_the_learning_rate():
    """u = λ x has norm λ ‖x‖, so that the step is lr · x whatever λ."""
    params = make_params()
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    Lamb(params, lr=0.1, weight_decay=0.7).step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), 0.9 * old, rtol=1e-14, atol=0)


def test_each_parameter_counts_its_own_steps():
    """One without a gradient rests; constant gradients make m̂ / √v̂ their sign at any count."""
    late, always = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    optimizer = Lamb([late, always], lr=0.1, eps=1e-12, weight_decay=0)
    for t in range(4):
        always.grad = torch.ones_like(always)
        late.grad = torch.ones_like(late) if t == 3 else None
        optimizer.step()
    assert late.tolist() == pytest.approx([0.9] * 4, rel=1e-10)
    assert always.tolist() == pytest.approx([0.9**4] * 4, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deepcopy_goes_the_same_way(dtype):
    params = make_params(dtype)
    optimizer = Lamb(params, lr=0.05)
    train(optimizer, params, range(5))
    params_copy, optimizer_copy = copy.deepcopy((params, optimizer))
    for p, o in ((params, optimizer), (params_copy, optimizer_copy)):
        train(o, p, range(5, 12))
    assert all(map(torch.equal, params, params_copy))


def test_a_checkpoint_goes_the_same_way(tmp_path):
    """Through the file that a run writes, bit for bit."""
    params = make_params(torch.float32)
    optimizer = Lamb(params, lr=0.05)
    train(optimizer, params, range(5))
    state = optimizer.state_dict()
    for values in state["state"].values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in values.values())
    weights = {f"weight.{i}": param.detach().clone() for i, param in enumerate(params)}
    checkpoint.write(tmp_path / "c", Checkpoint(5, weights, state, {}, {}, 1.0, "", 5))
    train(optimizer, params, range(5, 12))

    state = checkpoint.read_latest(tmp_path / "c")
    resumed = [nn.Parameter(state.tensors[f"weight.{i}"]) for i in range(len(params))]
    other = Lamb(resumed, lr=0.9)
    other.load_state_dict(state.optimizer)
    train(other, resumed, range(5, 12))
    assert all(map(torch.equal, params, resumed))


def test_learning_rate_schedulers_set_the_step():
    param = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = Lamb([param], lr=0.5, eps=1e-12, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    expected = 1.0
    for t in range(6):
        param.grad = torch.full_like(param, 3.0)
        optimizer.step()
        scheduler.step()
        expected *= 1 - 0.25 * (1 + math.cos(math.pi * t / 6))
        assert param.tolist() == pytest.approx([expected] * 2, rel=1e-9)


def test_a_closure_computes_gradients_and_its_loss_is_returned():
    param = nn.Parameter(torch.full((1,), 2.0))

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert Lamb([param]).step(closure).item() == 4
    assert param.item() < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.inf),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, math.nan)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
    ],
)
def test_an_option_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be.*got") as error:
        Lamb(make_params(), **{name: value})
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=f"{name} must be"):
        Lamb([{"params": make_params(), name: value}])
