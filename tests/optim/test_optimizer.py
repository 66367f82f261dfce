"""DPOptimizer against DP-SGD written as a loop over single records in float64."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from dpengine import Adaptive, Capture, DPOptimizer, PrivacyError
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.private import Private
from dpengine.models import adapter

IN, OUT, RANK = 6, 5, 2
MAX_GRAD_NORM = 0.5


class Attention(nn.Module):
    """The least that PEFT adapts: one linear layer under a target name."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.to_q(x)

    def add_adapter(self, config, adapter_name):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


@pytest.fixture
def model() -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention()
        adapter.add_lora(model, rank=RANK, alpha=3.0, target_modules=("to_q",), seed=0)
        for param in model.parameters():
            param.data = 0.3 * torch.randn_like(param)
    return model.train()


def private(model, *, draws=1, sigma=0.0, lr=1.0, expected=4.0, reduction="mean", kind=None):
    capture = Capture(model, draws_per_record=draws)
    inner = (kind or torch.optim.SGD)(capture.parameters, lr=lr)
    return capture, DPOptimizer(
        inner,
        noise_multiplier=sigma,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=expected,
        loss_reduction=reduction,
    )


def batch(n_rows: int) -> torch.Tensor:
    return torch.randn(n_rows, 3, IN, generator=torch.Generator().manual_seed(n_rows))


def row_losses(model, x) -> torch.Tensor:
    return model(x).square().flatten(1).sum(1)


def clipped_sum(model, x, draws: int) -> list[torch.Tensor]:
    """Σ_n min(1, C / ‖g_n‖) g_n by single records in float64."""
    model = copy.deepcopy(model).double()
    params = [param for param in model.parameters() if param.requires_grad]
    total = [torch.zeros_like(param) for param in params]
    for rows in x.double().split(draws):
        grads = torch.autograd.grad(row_losses(model, rows).mean(), params)
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        for tensor, grad in zip(total, grads, strict=True):
            tensor += min(1.0, MAX_GRAD_NORM / norm) * grad
    return total


def moved(before: list[torch.Tensor], params: list[torch.Tensor]) -> float:
    """How far the weights went, right to the rounding of float32 weights of size about 1."""
    squares = [
        (a - b.detach().double()).square().sum() for a, b in zip(before, params, strict=True)
    ]
    return math.sqrt(float(sum(squares)))


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_without_noise_is_the_clipped_sum_over_its_constant(model, draws, reduction):
    x = batch(8 * draws)
    expected = clipped_sum(model, x, draws)
    capture, optimizer = private(model, draws=draws, expected=3.0, reduction=reduction)
    before = [param.detach().clone() for param in capture.parameters]
    getattr(row_losses(model, x), reduction)().backward()
    optimizer.step()
    divisor = 3.0 if reduction == "mean" else 1.0
    for old, param, total in zip(before, capture.parameters, expected, strict=True):
        torch.testing.assert_close((old - param).double(), total / divisor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["aligned", "cancelling"])
def test_all_draws_of_a_record_are_one_contribution(model, kind):
    """8 draws move the sum by at most C; clipped one by one they could move it by 8 C."""
    x = batch(1).repeat(8, 1, 1)
    if kind == "cancelling":
        x[1::2] *= -1e3
    capture, optimizer = private(model, draws=8, expected=1.0)
    before = [param.detach().clone().double() for param in capture.parameters]
    row_losses(model, x).mean().backward()
    optimizer.step()
    assert moved(before, capture.parameters) <= MAX_GRAD_NORM + 1e-6


def test_physical_batches_add_up_to_the_logical_batch(model):
    x = batch(6)
    expected = clipped_sum(model, x, 1)
    capture, optimizer = private(model, expected=6.0)
    before = [param.detach().clone() for param in capture.parameters]
    for number in range(3):
        capture.announcements.announce(
            BatchNotice(Private(2), 2, is_first=number == 0, is_last=number == 2)
        )
        row_losses(model, x[2 * number : 2 * number + 2]).mean().backward()
        optimizer.step()
        assert optimizer._is_last_step_skipped == (number < 2)
        optimizer.zero_grad()
    for old, param, total in zip(before, capture.parameters, expected, strict=True):
        torch.testing.assert_close((old - param).double(), total / 6.0, rtol=1e-5, atol=1e-6)


def test_padding_and_bad_records_change_no_bit_of_the_update(model):
    """The same weights come out whatever the padding and the dropped record hold."""
    results = []
    for fill in (0.0, 1.0, float("nan"), float("inf"), 1e38):
        trained = copy.deepcopy(model)
        x = batch(4)
        x[2:] = fill
        capture, optimizer = private(trained)
        capture.announcements.announce(
            BatchNotice(Private(3 if fill != fill else 2), 4, is_first=True, is_last=True)
        )
        row_losses(trained, x).mean().backward()
        optimizer.step()
        results.append([param.detach().clone() for param in capture.parameters])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_is_a_noise_only_step(model):
    capture, optimizer = private(model, sigma=2.0, expected=1.0)
    before = [param.detach().clone() for param in capture.parameters]
    capture.announcements.announce(BatchNotice(Private(0), 4, is_first=True, is_last=True))
    row_losses(model, torch.zeros(4, 3, IN)).mean().backward()
    optimizer.step()
    assert not optimizer._is_last_step_skipped
    changes = [
        (old - param.detach()).flatten()
        for old, param in zip(before, capture.parameters, strict=True)
    ]
    # On the grid of noised sums about one value in 700 stays what it was.
    assert all((change != 0).double().mean() > 0.5 for change in changes)
    change = torch.cat(changes)
    # 22 normals of standard deviation σ C = 1: the chance of leaving these bounds is below 1e-6.
    assert 0.3 < change.std() < 2.2


def test_the_noise_has_the_scale_sigma_c_over_expected_size(model):
    capture, optimizer = private(model, sigma=3.0, lr=1.0, expected=5.0)
    draws = []
    for _ in range(400):
        before = [param.detach().clone() for param in capture.parameters]
        capture.announcements.announce(BatchNotice(Private(0), 1, is_first=True, is_last=True))
        row_losses(model, torch.zeros(1, 3, IN)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        draws += [
            (old - param.detach()).flatten()
            for old, param in zip(before, capture.parameters, strict=True)
        ]
    noise = torch.cat(draws).double()
    scale = 3.0 * MAX_GRAD_NORM / 5.0
    # The sample variance of n normals has relative standard deviation √(2/n); 5 of them allowed.
    error = abs(float(noise.var()) / scale**2 - 1)
    assert error < 5 * math.sqrt(2 / len(noise)) < 0.1


def test_an_adaptive_step_noises_sum_and_count(model):
    """Both as their costs say: σ_sum C on each value of the sum, σ_b on the count of records."""
    capture = Capture(model)
    mode = Adaptive(MAX_GRAD_NORM, count_noise_stddev=1.6, quantile=0.5, learning_rate=0.2)
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=3.0,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=50.0,
        clipping=mode,
    )
    sums, counts = [], []
    for _ in range(300):
        optimizer.clipping = mode
        optimizer.discard()  # an empty sum under the bound just set
        capture.announcements.announce(BatchNotice(Private(0), 1, is_first=True, is_last=True))
        row_losses(model, torch.zeros(1, 3, IN)).mean().backward()
        optimizer.step()
        sums += [50 * param.grad.flatten() for param in capture.parameters]
        # C exp(-η (share - 1/2)), where share - 1/2 is the noise over 50: 15 of its deviations fit.
        counts.append(-50 * math.log(optimizer.max_grad_norm / MAX_GRAD_NORM) / 0.2)
        # The share that is shown is the noised one, and no other.
        assert optimizer.clipping.noisy_share == pytest.approx(0.5 + counts[-1] / 50, abs=1e-9)
        optimizer.zero_grad()
    sum_stddev = MAX_GRAD_NORM / math.sqrt(3.0**-2 - 3.2**-2)
    for noise, stddev in ((torch.cat(sums).double(), sum_stddev), (torch.tensor(counts), 1.6)):
        # As above, and six of the deviations of a sample variance.
        error = abs(float(noise.double().var()) / stddev**2 - 1)
        assert error < 6 * math.sqrt(2 / len(noise)) < 0.5


def test_a_pickle_holds_neither_the_sum_nor_the_key(model):
    capture, optimizer = private(model, sigma=1.0)
    capture.announcements.announce(BatchNotice(Private(4), 4, is_first=True, is_last=False))
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()  # a logical batch is under way
    clipped = optimizer._answers[0].values
    total = clipped.numpy().tobytes()
    assert clipped.count_nonzero() > 0
    assert total in pickle.dumps(clipped)  # that is what would be seen
    saved = pickle.dumps(optimizer)
    assert total not in saved and optimizer._random._key not in saved


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_any_torch_optimizer_and_scheduler_work(model, kind):
    capture, optimizer = private(model, lr=0.5, kind=kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = [param.detach().clone() for param in capture.parameters]
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.original_optimizer.param_groups is optimizer.param_groups
    assert all(not torch.equal(a, b) for a, b in zip(before, capture.parameters, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.original_optimizer.param_groups is optimizer.param_groups


def test_state_dict_is_that_of_the_inner_optimizer(model):
    _, optimizer = private(model, kind=torch.optim.AdamW, sigma=1.0)
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    names = {name for state in optimizer.state_dict()["state"].values() for name in state}
    assert names == {"step", "exp_avg", "exp_avg_sq"}


def test_manual_seed_does_not_repeat_the_noise(model):
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        trained = copy.deepcopy(model)
        capture, optimizer = private(trained, sigma=1.0)
        row_losses(trained, batch(4)).mean().backward()
        optimizer.step()
        updates.append(capture.parameters[0].detach())
    assert (updates[0] != updates[1]).double().mean() > 0.5  # on a grid some agree


def test_a_step_without_a_backward_is_refused(model):
    _, optimizer = private(model)
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        optimizer.step()


def test_a_step_after_step_is_refused(model):
    _, optimizer = private(model)
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        optimizer.step()


def test_a_backward_after_step_without_zero_grad_is_refused(model):
    """The noised gradient still lies in param.grad: nothing may be added to it."""
    _, optimizer = private(model)
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    row_losses(model, batch(4)).mean().backward()
    with pytest.raises(PrivacyError, match="zero_grad"):
        optimizer.step()


def test_an_abandoned_logical_batch_leaves_nothing_in_the_next(model):
    """A record of both would move one noised sum by 2 C."""
    capture, optimizer = private(model, expected=1.0)
    capture.announcements.announce(BatchNotice(Private(1), 1, is_first=True, is_last=False))
    row_losses(model, 1e3 * batch(1)).mean().backward()
    optimizer.step()
    before = [param.detach().clone().double() for param in capture.parameters]
    capture.announcements.announce(BatchNotice(Private(1), 1, is_first=True, is_last=True))
    row_losses(model, 1e3 * batch(1)).mean().backward()
    optimizer.step()
    assert moved(before, capture.parameters) <= MAX_GRAD_NORM + 1e-6


def test_an_update_that_fails_leaves_nothing_in_the_next(model, monkeypatch):
    capture, optimizer = private(model, expected=1.0)

    def fail():
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(optimizer.original_optimizer, "step", fail)
        row_losses(model, 1e3 * batch(1)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    before = [param.detach().clone().double() for param in capture.parameters]
    # Without a sampler every batch opens a logical batch; here the next one claims not to.
    capture.announcements.announce(BatchNotice(Private(1), 1, is_first=False, is_last=True))
    row_losses(model, 1e3 * batch(1)).mean().backward()
    optimizer.step()
    assert moved(before, capture.parameters) <= MAX_GRAD_NORM + 1e-6


def test_a_tensor_added_after_wrapping_is_refused(model):
    """It would be updated by its plain gradient."""
    _, optimizer = private(model, sigma=5.0)
    bias = model.to_q.base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="captured"):
        optimizer.add_param_group({"params": [bias]})
    optimizer.original_optimizer.add_param_group({"params": [bias]})
    row_losses(model, batch(4)).mean().backward()
    with pytest.raises(ValueError, match="captured"):
        optimizer.step()


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_one_factor_alone_can_be_trained(model, frozen):
    x = batch(4)
    for name, param in model.named_parameters():
        if frozen in name:
            param.requires_grad_(False)
    expected = clipped_sum(model, x, 1)
    capture, optimizer = private(model, expected=1.0)
    before = [param.detach().clone() for param in capture.parameters]
    row_losses(model, x).mean().backward()
    optimizer.step()
    assert len(capture.parameters) == 1
    torch.testing.assert_close(
        (before[0] - capture.parameters[0]).double(), expected[0], rtol=1e-5, atol=1e-6
    )


def test_discard_forgets_the_unfinished_logical_batch(model):
    capture, optimizer = private(model)
    capture.announcements.announce(BatchNotice(Private(4), 4, is_first=True, is_last=False))
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    optimizer.discard()
    before = [param.detach().clone() for param in capture.parameters]
    capture.announcements.announce(BatchNotice(Private(0), 4, is_first=True, is_last=True))
    row_losses(model, batch(4)).mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, capture.parameters, strict=True))


def test_an_optimizer_without_capture_is_refused(model):
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ValueError, match="captured"):
        DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1.0)


def test_an_optimizer_that_misses_a_tensor_is_refused(model):
    inner = torch.optim.SGD(Capture(model).parameters[:1], lr=1.0)
    optimizer = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1.0)
    row_losses(model, batch(4)).mean().backward()
    with pytest.raises(ValueError, match="every trainable tensor"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("nan")),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.inf),
        ("expected_batch_size", 0.0),
        ("loss_reduction", "none"),
    ],
)
def test_bad_arguments_are_named(model, name, value):
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0}
    inner = torch.optim.SGD(Capture(model).parameters, lr=1.0)
    with pytest.raises(ValueError, match=name):
        DPOptimizer(inner, **(arguments | {name: value}))
