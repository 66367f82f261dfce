"""DPOptimizer beside Opacus' own: the same calls give the same weights, values and refusals."""

import copy
import functools
import inspect
import textwrap
from functools import partial

import opacus.optimizers.optimizer as opacus_optimizer
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer as Theirs
from torch import nn
from torch.optim import SGD, Adam, AdamW

from dpengine import Capture, DPOptimizer, PrivacyError
from dpengine.models import adapter

# torch's own word on Opacus' hooks at a module whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

TOKENS, IN, HIDDEN, OUT = 3, 6, 8, 2
BATCH, STEPS, BOUND = 8, 20, 8.0
SOURCES = ("captured", "swapped")
SMALL = 2.0**-10  # gradients of this scale are of the size that Opacus' 1e-6 is felt at

OPTIMIZERS = {
    "sgd": lambda params, scale: SGD(params, lr=0.005 / scale, momentum=0.9),
    "adam": lambda params, scale: Adam(params, lr=0.02),
    "adamw": lambda params, scale: AdamW(params, lr=0.02, weight_decay=0.1),
}


class Attention(nn.Module):
    """One head over tokens, under the names that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(IN, HIDDEN) for _ in range(3))
        self.out = nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))

    def add_adapter(self, config, adapter_name):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def new_model(kind: str = "mlp") -> nn.Module:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mlp":
            first, second = nn.Linear(TOKENS * IN, HIDDEN), nn.Linear(HIDDEN, OUT)
            return nn.Sequential(nn.Flatten(), first, nn.LayerNorm(HIDDEN), nn.Tanh(), second)
        model = Attention()
        adapter.add_lora(model, rank=2, alpha=3.0, target_modules=("to_q", "to_v"), seed=0)
        for param in trainable(model):
            param.data = 0.5 * torch.randn_like(param)
        return model.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def private(source, model, inner=None, *, theirs=Theirs, reduction="mean", params=None, **changed):
    """What is called, and the optimizer: `opacus`, ours with its module, ours with ``Capture``."""
    if source == "captured":
        Capture(model)
        called = model
    else:
        called = GradSampleModule(model, loss_reduction=reduction)
    inner = (inner or partial(SGD, lr=0.01, momentum=0.9))(params or trainable(model))
    settings = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": BATCH}
    kind = theirs if source == "opacus" else DPOptimizer
    return called, kind(inner, **(settings | {"loss_reduction": reduction} | changed))


def batch(seed: int, n_rows: int = BATCH) -> torch.Tensor:
    return torch.randn(n_rows, TOKENS, IN, generator=torch.Generator().manual_seed(seed))


def backward(called, x, reduction="mean", scale=1.0) -> None:
    # Targets far off: no gradient comes near zero, where Adam would divide rounding by rounding.
    losses = scale * (called(x) - torch.tensor([3.0, -3.0], dtype=x.dtype)).square().sum(1)
    getattr(losses, reduction)().backward()


def train(source, kind, optimizer, reduction, is_virtual, *, scale=1.0, bound=BOUND, **how):
    """Weights after 20 steps, and the norms of the records' gradients on the way."""
    dtype = how.pop("dtype", torch.float32)
    model = new_model(kind).to(dtype)
    inner = partial(OPTIMIZERS[optimizer], scale=scale * (BATCH if reduction == "sum" else 1))
    called, private_optimizer = private(
        source, model, inner, reduction=reduction, max_grad_norm=scale * bound, **how
    )
    norms = []
    for step in range(STEPS):
        chunks = batch(step).to(dtype).split([5, 3] if is_virtual else [BATCH])
        for number, chunk in enumerate(chunks, 1):
            backward(called, chunk, reduction, scale)
            norms.append(record_norms(private_optimizer.grad_samples))
            if number < len(chunks):
                private_optimizer.signal_skip_step(True)
            private_optimizer.step()
            private_optimizer.zero_grad()
    return [param.detach().double() for param in trainable(model)], torch.cat(norms)


def record_norms(grads) -> torch.Tensor:
    return torch.cat([grad.detach().double().flatten(1) for grad in grads], 1).norm(dim=1)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@functools.cache
def exact() -> type:
    """Opacus' optimizer without the 1e-6 that it adds to the norm it divides by."""
    source = textwrap.dedent(inspect.getsource(Theirs.clip_and_accumulate))
    assert source.count("1e-6") == 1
    members: dict = {}
    exec(source.replace("1e-6", "0.0"), vars(opacus_optimizer), members)
    return type("Exact", (Theirs,), members)


RUNS = [("mlp", reduction, virtual) for reduction in ("mean", "sum") for virtual in (False, True)]
RUNS += [("lora", "mean", True), ("lora", "sum", False)]


@pytest.mark.parametrize(("kind", "reduction", "is_virtual"), RUNS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_after_twenty_steps_are_those_of_opacus(kind, optimizer, reduction, is_virtual):
    """To 1e-5 of the way each tensor went: with norms >= 1 their 1e-6 is at most that of a factor,
    and float32 rounds three more in ten million.
    """
    theirs, norms = train("opacus", kind, optimizer, reduction, is_virtual)
    assert 1.0 <= norms.min() < BOUND < norms.max()
    for source in SOURCES:
        ours, _ = train(source, kind, optimizer, reduction, is_virtual)
        for mine, other, start in zip(ours, theirs, trainable(new_model(kind)), strict=True):
            assert (mine - other).norm() <= 1e-5 * (other - start).norm()
            assert (other - start).norm() > 0.05


@pytest.mark.parametrize(("kind", "reduction", "is_virtual"), RUNS[2:5:2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_its_constant_weights_equal_those_of_opacus_to_rounding(
    kind, optimizer, reduction, is_virtual
):
    """Against the same in float64, at most twice as wrong as Opacus in float32.

    And what is documented: our factors are float32 numbers below C / norm by up to 3 · 2⁻²³, so as
    never to pass C; what that does to the weights is computed in float64 as well. The gradients are
    so small that with the constant the weights lie further off than that.
    """
    how = {"kind": kind, "optimizer": optimizer, "reduction": reduction, "is_virtual": is_virtual}
    run = partial(train, **how, scale=SMALL)
    truth, lowered = (
        flat(run("opacus", theirs=exact(), dtype=torch.float64, bound=bound)[0])
        for bound in (BOUND, BOUND * (1 - 3 * 2.0**-23))
    )
    theirs = flat(run("opacus", theirs=exact())[0])
    allowed = 2 * (theirs - truth).norm() + (lowered - truth).norm()
    assert allowed < 1e-5 * (truth - flat(trainable(new_model(kind)))).norm()
    for source in SOURCES:
        assert (flat(run(source)[0]) - truth).norm() <= allowed
    assert (flat(run("opacus")[0]) - truth).norm() > 2 * allowed


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_backward_passes_before_a_step_are_one_batch_of_all_records(reduction):
    """Opacus' rule of the divisor is kept: the expected batch size times the passes."""
    grads = []
    for source in ("opacus", "swapped"):
        called, optimizer = private(source, new_model(), reduction=reduction)
        for seed in (0, 1):
            backward(called, batch(seed, 5), reduction)
        assert optimizer.accumulated_iterations == 2
        samples = torch.cat([grad.double().flatten(1) for grad in optimizer.grad_samples], 1)
        factors = (BOUND / samples.norm(dim=1)).clamp(max=1)
        optimizer.step()
        divisor = 2 * BATCH if reduction == "mean" else 1
        grads.append(flat(param.grad for param in optimizer.params))
        close(grads[-1], factors @ samples / divisor)
        assert len(factors) == 10
    close(*grads)


def two_batches(called, optimizer, *, first=0, zero_grad=True, reduction="mean"):
    for seed in (first, first + 1):
        backward(called, batch(seed), reduction)
        optimizer.step()
        if zero_grad:
            optimizer.zero_grad()
    return flat(optimizer.params)


def two_steps(source, weights=None, state=None, first=0):
    """Weights and state after two more steps of Adam."""
    model = new_model()
    model.load_state_dict(weights or model.state_dict())
    called, optimizer = private(source, model, partial(Adam, lr=0.05))
    optimizer.load_state_dict(copy.deepcopy(state or optimizer.state_dict()))
    two_batches(called, optimizer, first=first)
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("source", SOURCES)
def test_state_is_that_of_opacus_and_goes_on_in_either(source):
    theirs, ours = two_steps("opacus"), two_steps(source)
    close(ours, theirs)
    whole = two_steps("opacus", *theirs, first=2)
    assert whole[1]["state"][0]["step"] == 4
    for first, second in ((theirs, source), (ours, "opacus"), (ours, source)):
        close(two_steps(second, *first, first=2), whole)


@pytest.mark.parametrize("source", SOURCES)
def test_a_group_is_added_as_in_opacus(source):
    weights = []
    for which in (source, "opacus"):
        params = trainable(model := new_model())
        called, optimizer = private(which, model, params=params[:2])
        optimizer.add_param_group({"params": params[2:], "lr": 0.1})
        optimizer.zero_grad()  # Opacus' add_param_group leaves its new tensors without a sum
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
        weights.append(two_batches(called, optimizer))
    close(*weights)


@pytest.mark.parametrize("changed", [{"expected_batch_size": None}, {"secure_mode": True}])
@pytest.mark.parametrize("source", SOURCES)
def test_a_sum_needs_no_divisor_and_frozen_tensors_may_be_given(source, changed):
    weights = []
    for which in (source, "opacus"):
        model = new_model("lora")
        how = {"params": [*model.parameters()], "reduction": "sum"} | changed
        called, optimizer = private(which, model, **how)
        assert list(map(id, optimizer.params)) == list(map(id, trainable(model)))
        two_batches(called, optimizer, reduction="sum")
        weights.append(flat(model.parameters()))
    close(*weights)


def schedules(called, optimizer):
    """Without a warning: those are errors here, and a step that torch does not see is one."""
    seen = []
    for make in (
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=9),
    ):
        scheduler = make(optimizer)
        for step in range(8):
            backward(called, batch(step))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen += [optimizer.param_groups[0][name] for name in ("lr", "momentum")]
    assert len({*seen}) > 16
    return [*seen, flat(optimizer.params)]


def closure_given(called, optimizer):
    is_on = []

    def closure():
        is_on.append(torch.is_grad_enabled())
        backward(called, batch(0))
        return 7.0

    with torch.no_grad():
        return optimizer.step(closure), is_on, flat(optimizer.params)


def zero_grad_between_forward_and_backward(called, optimizer):
    loss = (called(batch(0)) - 3).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    return optimizer.step(), flat(optimizer.params)


def signals_and_hook(called, optimizer):
    """What pre_step, the step hook and the members that averages look at say of six passes."""
    seen = []

    def record(given):
        has_moved = not torch.equal(flat(given.params), before)
        seen.extend([given is optimizer, has_moved, flat(p.grad for p in given.params)])

    optimizer.attach_step_hook(record)
    for skip in (True, True, False, False, True):
        optimizer.signal_skip_step(skip)
    for seed in range(6):
        optimizer.zero_grad()
        before = flat(optimizer.params)
        backward(called, batch(seed, 4))
        seen.append(optimizer._check_skip_next_step(pop_next=False))
        seen += [optimizer.pre_step(), optimizer._is_last_step_skipped]
        if seen[-2]:
            optimizer.original_optimizer.step()
        seen.append(flat(optimizer.params))
    return seen


def signals_as_they_come(called, optimizer):
    seen = []
    for seed, skip in enumerate((False, True, False, None, True)):
        if skip is not None:
            optimizer.signal_skip_step(skip)
        backward(called, batch(seed, 4))
        seen += [optimizer.step(), optimizer._is_last_step_skipped, flat(optimizer.params)]
        optimizer.zero_grad()
    return [*seen, optimizer._check_skip_next_step()]


def members(called, optimizer):
    inner, proxies = optimizer.original_optimizer, ("param_groups", "state", "defaults")
    backward(called, batch(0))
    seen = [optimizer.accumulated_iterations, len(optimizer.params), repr(optimizer) == repr(inner)]
    seen += [getattr(optimizer, name) is getattr(inner, name) for name in proxies]
    for name in proxies:
        setattr(optimizer, name, copy.copy(getattr(inner, name)))
    seen += [getattr(optimizer, name) is getattr(inner, name) for name in proxies]
    optimizer.step()
    settings = (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size)
    return [*seen, *settings, optimizer.loss_reduction == "mean", flat(optimizer.params)]


def another_bound(called, optimizer):
    """As Opacus' schedulers of the bound and of the noise set them."""
    optimizer.max_grad_norm, optimizer.noise_multiplier = 2.5, 0.0
    return two_batches(called, optimizer)


SAMPLES = [(source, loss) for source in ("swapped", "captured") for loss in ("mean", "sum")]


@pytest.mark.parametrize(("source", "reduction"), SAMPLES)
def test_grad_samples_are_those_of_each_records_own_loss(source, reduction):
    grads = []
    for which in (source, "opacus"):
        called, optimizer = private(which, new_model(), reduction=reduction)
        backward(called, batch(0), reduction)
        grads.append(optimizer.grad_samples)
    close(*grads, atol=1e-5)


def no_backward(called, optimizer):
    optimizer.step()


def zero_grad_after_backward(called, optimizer):
    backward(called, batch(0))
    optimizer.zero_grad()
    optimizer.step()


def step_twice(called, optimizer):
    backward(called, batch(0))
    optimizer.step()
    optimizer.step()


SAME = [schedules, closure_given, zero_grad_between_forward_and_backward, members, another_bound]
SAME += [signals_and_hook, signals_as_they_come]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("calls", SAME, ids=lambda calls: calls.__name__)
def test_the_same_calls_give_what_they_give_with_opacus(source, calls):
    close(*(calls(*private(which, new_model())) for which in (source, "opacus")))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("calls", [no_backward, zero_grad_after_backward, step_twice])
def test_what_opacus_refuses_is_refused(source, calls):
    for which, error in (("opacus", ValueError), (source, PrivacyError)):
        with pytest.raises(error):
            calls(*private(which, new_model()))


def test_a_batch_after_a_step_without_zero_grad_is_refused_or_alone():
    """Opacus refuses it. What we took of its module is gone, so there the next batch is a batch."""
    for source, error in (("opacus", ValueError), ("captured", PrivacyError)):
        with pytest.raises(error, match="zero_grad"):
            two_batches(*private(source, new_model()), zero_grad=False)
    kept = two_batches(*private("swapped", new_model()), zero_grad=False)
    assert torch.equal(kept, two_batches(*private("swapped", new_model())))
