"""What goes wrong with Opacus 1.6 goes right here: each test shows both."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping as GhostModule
from opacus.optimizers import DPOptimizer as Theirs
from opacus.optimizers import DPOptimizerFastGradientClipping as GhostOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as GhostLoss
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from dpengine import Capture, DPOptimizer, PrivacyError

# torch's own word on Opacus' hooks at a module whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

IN, HIDDEN, OUT, BATCH = 6, 5, 2, 8
BOUND, SCALE = 0.5, 2.0**10
SOURCES = ("captured", "swapped")


class Model(nn.Module):
    """Two linear layers for inputs of any number of dimensions, and a third that nothing uses."""

    def __init__(self, *, is_checkpointed: bool = False, has_unused: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
        if has_unused:
            self.unused = nn.Linear(IN, OUT)
        self.is_checkpointed = is_checkpointed

    def forward(self, x):
        if self.is_checkpointed:
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)


def new_model(**kind) -> Model:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(**kind)


def batch(n_rows: int = BATCH, *tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_rows, *tokens, IN, generator=torch.Generator().manual_seed(seed))


def row_losses(called, x) -> torch.Tensor:
    return (called(x) - 2).square().flatten(1).sum(1)


def private(source, model, *, sigma=0.0, bound=BOUND, draws=1, momentum=0.0, **changed):
    """What is called, and the optimizer: `opacus`, ours with its module, ours with ``Capture``."""
    if source == "captured":
        Capture(model, draws_per_record=draws)
        called = model
    else:
        called = GradSampleModule(model, loss_reduction="sum")
    settings = {"noise_multiplier": sigma, "max_grad_norm": bound, "expected_batch_size": BATCH}
    kind = Theirs if source == "opacus" else DPOptimizer
    inner = SGD(model.parameters(), lr=1.0, momentum=momentum)
    return called, kind(inner, **settings, loss_reduction="sum", **changed)


def ghost(model):
    called = GhostModule(model, loss_reduction="sum", max_grad_norm=BOUND)
    optimizer = GhostOptimizer(
        SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=BATCH,
        loss_reduction="sum",
    )
    loss = GhostLoss(called, optimizer, lambda out, x, **_: row_losses(lambda _: out, x), "sum")
    return called, optimizer, loss


def clipped_sum(model, x, bound: float = BOUND) -> torch.Tensor:
    """Σ_n min(1, C / ‖g_n‖) g_n by single records in float64."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    total = torch.zeros(sum(param.numel() for param in params), dtype=torch.float64)
    for row in x.double().split(1):
        grads = torch.autograd.grad(row_losses(model, row).sum(), params, materialize_grads=True)
        grad = torch.cat([grad.flatten() for grad in grads])
        total += grad * min(1.0, bound / float(grad.norm()))
    return total


def weights(model) -> torch.Tensor:
    return torch.cat([param.detach().double().flatten() for param in model.parameters()])


def update(model) -> torch.Tensor:
    """By how much SGD at rate 1 has lowered the weights: what it took for the gradient."""
    return weights(new_model(has_unused=hasattr(model, "unused"))) - weights(model)


def one_step(source, model, x, **how) -> torch.Tensor:
    called, optimizer = private(source, model, **how)
    row_losses(called, x).sum().backward()
    optimizer.step()
    return update(model)


close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_a_bad_record_changes_no_bit_of_the_others(source, fill):
    x = batch()
    called, optimizer = private(source, without := new_model())
    (row_losses(called, x) * (torch.arange(BATCH) != 2)).sum().backward()  # record 2 has gradient 0
    optimizer.step()
    x[2] = fill
    one_step(source, model := new_model(), x)
    assert torch.equal(weights(model), weights(without))
    close(update(model), clipped_sum(new_model(), x[torch.arange(BATCH) != 2]))
    assert one_step("opacus", new_model(), x).isnan().all()


def test_activation_checkpointing_works():
    with pytest.raises(ValueError, match="not initialized"):
        one_step("opacus", new_model(is_checkpointed=True), batch())
    ours = one_step("captured", new_model(is_checkpointed=True), batch())
    close(ours, clipped_sum(new_model(), batch()))
    assert torch.equal(ours, one_step("captured", new_model(), batch()))


def test_a_convolution_over_channels_last_images():
    """Attention over pixels hands such images on; Opacus reads them as if channels came first."""

    def new():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Conv2d(3, 2, 3, padding=1, bias=False)

    images = torch.randn(BATCH, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = {}
    for source in ("opacus", "captured", "swapped"):
        called, optimizer = private(source, model := new())
        row_losses(called, images.contiguous(memory_format=torch.channels_last)).sum().backward()
        optimizer.step()
        found[source] = weights(new()) - weights(model)
    exact = clipped_sum(new(), images)
    close(found["captured"], exact)
    for theirs in ("opacus", "swapped"):  # whose gradients are Opacus' own
        assert (found[theirs] - exact).norm() > 0.5 * exact.norm()


def test_no_batch_is_lost_between_two_backward_passes():
    first, second = batch(seed=1), batch(seed=2)
    called, optimizer, loss = ghost(theirs := new_model())
    for x in (first, second):
        loss(called(x), x).backward()
    optimizer.step()
    close(update(theirs), clipped_sum(new_model(), second))
    called, optimizer = private("captured", ours := new_model())
    row_losses(called, first).sum().backward()
    with pytest.raises(PrivacyError, match="after each backward"):
        row_losses(called, second)
    optimizer.step()
    close(update(ours), clipped_sum(new_model(), first))


def test_eight_draws_of_a_record_are_one_record():
    rows = batch(1).repeat(8, 1)
    assert clipped_sum(new_model(), rows[:1]).norm() > 0.99 * BOUND
    ours = one_step("captured", new_model(), rows, draws=8)
    assert 0.99 * BOUND < ours.norm() <= BOUND * (1 + 1e-6)
    assert one_step("opacus", new_model(), rows).norm() > 7.99 * BOUND


@pytest.mark.parametrize("source", SOURCES)
def test_a_scale_is_undone_before_the_norm_and_none_may_follow_overflows(source):
    large = 1e3  # so large that nothing is clipped
    right = clipped_sum(new_model(), batch(), large)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    called, optimizer = private("opacus", model := new_model(), bound=large)
    scaler.scale(row_losses(called, batch()).sum()).backward()
    scaler.step(optimizer)
    close(update(model), SCALE * clipped_sum(new_model(), batch(), large / SCALE))
    assert update(model).norm() > 10 * right.norm()

    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    called, optimizer = private(source, model := new_model(), bound=large)
    scaler.scale(row_losses(called, batch()).sum()).backward()
    with pytest.raises(PrivacyError, match=r"overflows.*loss_scale"):
        scaler.step(optimizer)
    assert update(model).norm() == 0

    called, optimizer = private(source, model := new_model(), bound=large, loss_scale=SCALE)
    (SCALE * row_losses(called, batch()).sum()).backward()
    optimizer.step()
    close(update(model), right)
    assert torch.equal(update(model), one_step(source, new_model(), batch(), bound=large))


@pytest.mark.parametrize("source", SOURCES)
def test_step_hooks_run_around_each_step(source):
    _, theirs = private("opacus", new_model())
    for register in (theirs.register_step_pre_hook, theirs.register_step_post_hook):
        with pytest.raises(AttributeError):
            register(print)
    called, optimizer = private(source, model := new_model())
    seen = []
    for name in ("pre", "post"):
        register = getattr(optimizer, f"register_step_{name}_hook")
        handle = register(
            lambda given, args, kwargs, name=name: seen.append(
                (name, given is optimizer, bool(update(model).any()))
            )
        )
    for expected in ("pre post", "pre"):
        row_losses(called, batch()).sum().backward()
        before = len(seen)
        optimizer.step()
        optimizer.zero_grad()
        assert [name for name, *_ in seen[before:]] == expected.split()
        handle.remove()
    assert [is_same for _, is_same, _ in seen] == [True] * 3
    assert [moved for *_, moved in seen] == [False, True, True]


def test_inputs_of_four_dimensions_work():
    x = batch(BATCH, 2, 3)
    called, _, loss = ghost(new_model())
    with pytest.raises(AttributeError):
        loss(called(x), x).backward()
    close(one_step("captured", new_model(), x), clipped_sum(new_model(), x))


@pytest.mark.parametrize("source", SOURCES)
def test_a_tensor_that_is_not_used_is_not_updated_and_stops_nothing(source):
    with pytest.raises(ValueError, match="not initialized"):
        one_step("opacus", new_model(has_unused=True), batch())
    ours = one_step(source, new_model(has_unused=True), batch())
    close(ours, clipped_sum(new_model(has_unused=True), batch()))
    assert not ours[-OUT * (IN + 1) :].any()


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_that_takes_the_noise_away_again_is_refused(source):
    noised, noise = (
        one_step("opacus", new_model(), x, sigma=1e3, generator=torch.Generator().manual_seed(7))
        for x in (batch(), batch()[:0])
    )
    torch.testing.assert_close(noised - noise, clipped_sum(new_model(), batch()), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="generator"):
        private(source, new_model(), generator=torch.Generator())


@pytest.mark.parametrize("source", SOURCES)
def test_an_argument_that_nothing_reads_is_refused(source):
    private("opacus", new_model(), max_norm=1.0)  # a slip of the pen that Opacus swallows
    with pytest.raises(TypeError, match="max_norm"):
        private(source, new_model(), max_norm=1.0)
    for kind in (Theirs, DPOptimizer):  # and what both refuse: a mean needs its divisor
        _, made = private(source, new_model())
        with pytest.raises(ValueError, match=r"expected.batch.size"):
            kind(
                made.original_optimizer,
                noise_multiplier=0.0,
                max_grad_norm=BOUND,
                expected_batch_size=None,
            )


def test_an_optimizer_of_several_evaluations_is_refused_when_it_is_made():
    settings = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": BATCH}
    called, _ = private("swapped", model := new_model())
    theirs = Theirs(torch.optim.LBFGS(model.parameters()), **settings)
    row_losses(called, batch()).sum().backward()
    with pytest.raises(TypeError, match="closure"):
        theirs.step(lambda: 0.0)
    with pytest.raises(TypeError, match="LBFGS"):
        DPOptimizer(torch.optim.LBFGS(model.parameters()), **settings)


def test_gradients_come_from_one_source_and_that_is_known_when_it_is_made():
    settings = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": None}
    settings["loss_reduction"] = "sum"
    model = new_model()
    inner = SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="not found"):
        Theirs(inner, **settings).step()  # and not before
    with pytest.raises(ValueError, match="captured"):
        DPOptimizer(inner, **settings)
    capture, wrapped = Capture(model), GradSampleModule(model, loss_reduction="sum")
    with pytest.raises(ValueError, match="to_standard_module"):
        DPOptimizer(inner, **settings)
    capture.detach()
    optimizer = DPOptimizer(inner, **settings)
    row_losses(wrapped, batch()).sum().backward()
    optimizer.step()
    close(update(model), clipped_sum(new_model(), batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_types_get_what_float64_gives(dtype):
    """Rounded once to bfloat16, by up to 2⁻⁸; Opacus' norm, factors and sum are in it as well.

    And what float32 costs: 2⁻²⁴ each for gradient and norm, up to 6 · 2⁻²⁴ for the factor.
    """
    errors = {}
    for source in ("swapped", "opacus"):
        called, optimizer = private(source, new_model().to(dtype))
        row_losses(called, batch().to(dtype)).sum().backward()
        grads = torch.cat([grad.double().flatten(1) for grad in optimizer.grad_samples], 1)
        parts = grads * (BOUND / grads.norm(dim=1, keepdim=True)).clamp(max=1)
        optimizer.step()
        assert all(param.grad.dtype == dtype for param in optimizer.params)
        ours = torch.cat([param.grad.double().flatten() for param in optimizer.params])
        rounding = 8 * 2.0**-24 * parts.abs().sum(0)
        if dtype == torch.bfloat16:
            rounding += 2.0**-8 * parts.sum(0).abs()
        errors[source] = ((ours - parts.sum(0)).abs() / rounding).max()
    assert errors["swapped"] <= 1
    assert dtype == torch.float64 or errors["opacus"] > 2


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


def run(called, optimizer, seeds) -> torch.Tensor:
    """The noised gradients of a step for each seed.  [len(seeds), P]"""
    grads = []
    for seed in seeds:
        row_losses(called, batch(seed=seed)).sum().backward()
        optimizer.step()
        grads.append(torch.cat([param.grad.flatten() for param in optimizer.params]))
        optimizer.zero_grad()
    return torch.stack(grads)


def copied(source, how, called, optimizer):
    """What is called, and the optimizer, then the same of a copy, private on its own."""
    model = called if source == "captured" else called.to_standard_module()
    twin, twin_optimizer = COPIES[how]((model, optimizer))
    with pytest.raises(ValueError, match="captured"):
        twin_optimizer.step()
    if source == "captured":
        Capture(twin)
        return called, twin, twin_optimizer
    called, twin = (GradSampleModule(one, loss_reduction="sum") for one in (model, twin))
    return called, twin, twin_optimizer


def test_opacus_optimizer_cannot_be_copied_and_breaks_those_that_follow(monkeypatch):
    monkeypatch.setattr(Theirs, "step", Theirs.step)  # put back, as torch replaces it below
    _, optimizer = private("opacus", new_model())
    with pytest.raises(AttributeError):
        copy.deepcopy(optimizer)
    with pytest.raises(AttributeError):
        run(*private("opacus", new_model()), [1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_beside_the_original(how, source):
    """From the weights and the state, with nothing of the batch that the original is in."""

    def begin():
        called, optimizer = private(source, new_model(), momentum=0.9)
        run(called, optimizer, [1, 2])
        return called, optimizer

    def skip(called, optimizer):
        optimizer.signal_skip_step(True)
        row_losses(called, batch(seed=3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    called, optimizer = begin()
    skip(called, optimizer)
    called, twin, twin_optimizer = copied(source, how, called, optimizer)
    run(twin, twin_optimizer, [4, 5])
    run(called, optimizer, [4, 5])
    for model, has_more in ((twin, False), (called, True)):
        other, other_optimizer = begin()
        if has_more:
            skip(other, other_optimizer)
        run(other, other_optimizer, [4, 5])
        assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(twin), weights(called))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_draws_noise_of_its_own(how, source):
    """Both see the same batches; the noise is 10⁶ times what those can move.

    Independent noise of n values has a correlation of standard deviation 1 / √n; 5 are allowed.
    """
    called, optimizer = private(source, new_model(), sigma=1e6)
    called, twin, twin_optimizer = copied(source, how, called, optimizer)
    both = [run(called, optimizer, range(20)), run(twin, twin_optimizer, range(20))]
    assert (both[0] != both[1]).double().mean() > 0.9  # on the grid of noised sums some agree
    mine, theirs = (noise.double().flatten() for noise in both)
    assert abs(float(torch.corrcoef(torch.stack([mine, theirs]))[0, 1])) < 5 / len(mine) ** 0.5
    for noise in (mine, theirs):  # a sample variance of relative standard deviation √(2 / n)
        assert abs(float(noise.var()) / (1e6 * BOUND) ** 2 - 1) < 5 * (2 / len(noise)) ** 0.5
