"""AdamWBC against DP-AdamBC written as a loop over numbers, and against torch.optim.AdamW."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpengine.optim.update import AdamWBC
from dpengine.run import checkpoint
from dpengine.run.checkpoint import Checkpoint

SHAPES = ((3, 2), (4,))
STEPS = 15


def make_params(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def gradients(step, params):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def train(optimizer, params, steps):
    for step in steps:
        for param, grad in zip(params, gradients(step, params), strict=True):
            param.grad = grad
        optimizer.step()


def adambc(x, grads, *, lr, betas, variance, floor, decay):
    """One weight under the paper's update, in Python's floats; and how often the floor held."""
    m = v = 0.0
    floored = 0
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        corrected = v / (1 - betas[1] ** t) - variance
        floored += corrected < floor
        x -= lr * decay * x
        x -= lr * m / (1 - betas[0] ** t) / math.sqrt(max(corrected, floor))
    return x, floored


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.8, 0.9)])
@pytest.mark.parametrize("variance", [0.0, 0.6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_update_of_the_paper(betas, variance, decay):
    params, lr, floor = make_params(), 0.05, 0.02
    before = [param.detach().clone() for param in params]
    optimizer = AdamWBC(params, lr, betas, noise_variance=variance, floor=floor, weight_decay=decay)
    train(optimizer, params, range(STEPS))
    floored = 0
    for i, param in enumerate(params):
        grads = torch.stack([gradients(t, params)[i].flatten() for t in range(STEPS)], dim=1)
        starts = before[i].flatten().tolist()
        for value, start, series in zip(
            param.flatten().tolist(), starts, grads.tolist(), strict=True
        ):
            expected, count = adambc(
                start,
                series,
                lr=lr,
                betas=betas,
                variance=variance,
                floor=floor,
                decay=decay,
            )
            floored += count
            # Some 10 roundings a step, each magnified at most by (v / floor) <= 1e3.
            assert value == pytest.approx(expected, rel=0, abs=STEPS * 10 * 1e3 * 2**-53)
    if variance:  # both sides of the floor were met
        assert 0 < floored < STEPS * 10


def test_without_noise_it_is_adamw_without_eps():
    ours, theirs = make_params(), make_params()
    options = {"lr": 0.03, "betas": (0.9, 0.99), "weight_decay": 0.2}
    train(AdamWBC(ours, **options, noise_variance=0, floor=1e-30), ours, range(STEPS))
    train(torch.optim.AdamW(theirs, **options, eps=0), theirs, range(STEPS))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def last_updates(make, *, beta1, noise_std, steps, n):
    """The last update, over lr, of ``n`` weights with gradient 1 + noise; and the last gradient."""
    param = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = make([param], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        param.grad = 1 + noise_std * noise
        before = param.detach().clone()
        optimizer.step()
    return before - param.detach(), param.grad


def bc(variance):
    return lambda params, **options: AdamWBC(params, **options, noise_variance=variance, floor=1e-6)


NOISE_STD, NOISY_STEPS, ELEMENTS = 1.5, 1000, 10_000
# Variance of g² for g = 1 + noise, and the weights of v̂ squared and summed: the variance of v̂.
VAR_OF_SQUARE = 2 * NOISE_STD**4 + 4 * NOISE_STD**2
SQUARED_WEIGHTS = (1 - 0.999) / 1.999 * (1 + 0.999**NOISY_STEPS) / (1 - 0.999**NOISY_STEPS)
VAR_OF_V = VAR_OF_SQUARE * SQUARED_WEIGHTS


def test_the_second_moment_is_unbiased_and_that_of_adamw_is_not():
    """With β₁ = 0 the update is g / √estimate. Six standard errors: one false alarm in 5e8."""
    tolerance = 6 * math.sqrt(VAR_OF_V / ELEMENTS)
    run = {"beta1": 0.0, "noise_std": NOISE_STD, "steps": NOISY_STEPS, "n": ELEMENTS}
    update, grad = last_updates(bc(NOISE_STD**2), **run)
    assert (grad / update).square().mean().item() == pytest.approx(1, abs=tolerance)
    update, grad = last_updates(torch.optim.AdamW, **run)
    biased = (grad / update).square().mean().item()
    assert biased == pytest.approx(1 + NOISE_STD**2, abs=tolerance)


def test_the_update_tends_to_that_of_adam_without_noise():
    """Adam without noise moves by lr. To second order in the errors of m̂ and V = v̂ - Φ,

    E[m̂ / √V] = 1 + 3/8 Var V - 1/2 Cov(m̂, V), both small; twice that bounds the rest.
    """
    run = {"beta1": 0.9, "noise_std": NOISE_STD, "steps": NOISY_STEPS, "n": ELEMENTS}
    weights = 0.1 * 0.001 / (1 - 0.9 * 0.999) / (1 - 0.999**NOISY_STEPS)
    covariance = 2 * NOISE_STD**2 * weights
    standard_error = math.sqrt((NOISE_STD**2 * 0.1 / 1.9 + VAR_OF_V / 4) / ELEMENTS)
    tolerance = 6 * standard_error + 2 * (3 / 8 * VAR_OF_V + covariance / 2)
    assert tolerance < 0.05
    assert last_updates(bc(NOISE_STD**2), **run)[0].mean().item() == pytest.approx(1, abs=tolerance)
    shrunk = last_updates(torch.optim.AdamW, **run)[0].mean().item()
    assert shrunk == pytest.approx(1 / math.sqrt(1 + NOISE_STD**2), abs=tolerance)


def test_noise_of_changing_variance_is_taken_out_as_it_went_in():
    """Gradients ±√Φ_t alone: v̂ is the average of the Φ_t, nothing is left, the floor holds."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    floor, beta1, m = 1e-4, 0.9, 0.0
    optimizer = AdamWBC([param], 1.0, (beta1, 0.99), noise_variance=1, floor=floor, weight_decay=0)
    for t, variance in enumerate((4.0, 4.0, 1.0, 9.0, 0.0, 0.25), 1):
        grad = (-1) ** t * math.sqrt(variance)
        m = beta1 * m + (1 - beta1) * grad
        optimizer.param_groups[0]["noise_variance"] = variance
        param.grad = torch.full_like(param, grad)
        before = param.item()
        optimizer.step()
        expected = m / (1 - beta1**t) / math.sqrt(floor)
        assert before - param.item() == pytest.approx(expected, rel=1e-10)


def test_weight_decay_is_decoupled():
    """With gradient 0 the moments stay 0 and a weight shrinks by 1 - lr · decay."""
    params = make_params()
    before = [param.detach().clone() for param in params]
    optimizer = AdamWBC(params, 0.1, noise_variance=0.3, floor=1e-3, weight_decay=0.5)
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), start * 0.95**4, rtol=1e-14, atol=0)
        assert not optimizer.state[param]["exp_avg"].any()


def test_each_parameter_counts_its_own_steps():
    """One without a gradient rests, and starts with a bias correction of its own."""
    late, always = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamWBC([late, always], 0.1, noise_variance=0.5, floor=1e-9, weight_decay=0)
    for t in range(4):
        always.grad = torch.ones_like(always)
        late.grad = torch.ones_like(late) if t == 3 else None
        optimizer.step()
    # g² - Φ = 1/2 in each step, for both: every step is lr √2.
    step = 0.1 * math.sqrt(2)
    assert late.tolist() == pytest.approx([-step] * 2, rel=1e-12)
    assert always.tolist() == pytest.approx([-4 * step] * 2, rel=1e-12)


def test_groups_keep_their_own_options():
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.2, "noise_variance": 0.75}]
    optimizer = AdamWBC(groups, 0.1, noise_variance=0, floor=1e-9, weight_decay=0)
    for param in (a, b):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert (a.item(), b.item()) == pytest.approx((-0.1, -0.2 / math.sqrt(0.25)), rel=1e-12)


def make(params, **options):
    return AdamWBC(params, 0.05, noise_variance=0.4, floor=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deepcopy_goes_the_same_way(dtype):
    params = make_params(dtype)
    optimizer = make(params)
    train(optimizer, params, range(5))
    params_copy, optimizer_copy = copy.deepcopy((params, optimizer))
    for p, o in ((params, optimizer), (params_copy, optimizer_copy)):
        train(o, p, range(5, 12))
    assert all(map(torch.equal, params, params_copy))


def test_a_checkpoint_goes_the_same_way(tmp_path):
    """Through the file that a run writes, bit for bit, noise of another variance included."""
    params = make_params(torch.float32)
    optimizer = make(params)
    train(optimizer, params, range(5))
    optimizer.param_groups[0]["noise_variance"] = 0.9
    weights = {f"weight.{i}": param.detach().clone() for i, param in enumerate(params)}
    state = Checkpoint(5, weights, optimizer.state_dict(), {}, {}, 1.0, "", 5)
    checkpoint.write(tmp_path / "c", state)
    train(optimizer, params, range(5, 12))

    state = checkpoint.read_latest(tmp_path / "c")
    resumed = [nn.Parameter(state.tensors[f"weight.{i}"]) for i in range(len(params))]
    other = make(resumed)
    other.load_state_dict(state.optimizer)
    train(other, resumed, range(5, 12))
    assert all(map(torch.equal, params, resumed))


def test_the_state_is_tensors_and_numbers():
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, range(2))
    for values in optimizer.state_dict()["state"].values():
        assert set(values) == {"step", "exp_avg", "exp_avg_sq", "exp_avg_noise"}
        assert all(isinstance(v, torch.Tensor | int | float) for v in values.values())


def test_learning_rate_schedulers_set_the_step():
    """A constant gradient without noise moves a weight by the learning rate of the step."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamWBC([param], 0.5, noise_variance=0, floor=1e-12, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)
    for t in range(5):
        before = param.item()
        param.grad = torch.full_like(param, -3.0)
        optimizer.step()
        scheduler.step()
        assert param.item() - before == pytest.approx(0.5 * (1 - t / 5), rel=1e-12)


def test_a_closure_computes_gradients_and_its_loss_is_returned():
    param = nn.Parameter(torch.full((1,), 2.0))

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss

    assert make([param]).step(closure).item() == 4
    assert param.item() < 2


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_it_takes_no_more_operations_than_adamw():
    """56 tensors, as the LoRA of a small UNet has; after the first step, which makes the state."""
    counts = []
    for kind, options in (
        (AdamWBC, {"noise_variance": 0.1, "floor": 1e-3}),
        (torch.optim.AdamW, {"foreach": True}),
    ):
        params = make_params(torch.float32, [(4, 8)] * 56)
        optimizer = kind(params, **options)
        train(optimizer, params, range(1))
        with Count() as count:
            optimizer.step()
        counts.append(count.n)
    assert 0 < counts[0] <= counts[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("noise_variance", -1e-9),
        ("noise_variance", math.inf),
        ("floor", 0.0),
        ("floor", math.nan),
        ("weight_decay", -0.1),
    ],
)
def test_an_option_out_of_range_is_refused(name, value):
    options = {"noise_variance": 0.1, "floor": 1e-3}
    with pytest.raises(ValueError, match=f"{name} must be.*got") as error:
        AdamWBC(make_params(), **options | {name: value})
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdamWBC([{"params": make_params(), name: value}], **options)


def test_a_noise_variance_out_of_range_is_refused_before_any_weight_moves():
    params = make_params()
    optimizer = make(params)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["noise_variance"] = -0.5
    with pytest.raises(ValueError, match=r"noise_variance must be.*-0\.5"):
        train(optimizer, params, range(1))
    assert all(map(torch.equal, params, before))
