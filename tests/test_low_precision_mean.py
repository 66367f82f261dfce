"""Below float32 a mean loss over a private number of rows is refused: it rounds every record."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import BatchMemoryManager, Capture, DPOptimizer, PrivacyEngine, PrivacyError
from dpengine.record_grads import RecordGrads


class Half(nn.Module):
    """A frozen layer in half precision behind the trained one, which sees float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 2).bfloat16().requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.trained(x).bfloat16()).float()


class AutocastInside(Half):
    def __init__(self) -> None:
        super().__init__()
        self.frozen.float()

    def forward(self, x):
        hidden = self.trained(x)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.frozen(hidden)
        return hidden.float()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def step(module, optimizer, x, reduction, autocast=None) -> None:
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = module(x)
    getattr((output.float() - 1).square().sum(1), reduction)().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(module, reduction) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(Capture(module.train()).parameters, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4.0,
        loss_reduction=reduction,
    )


CASES = {
    "bf16 autocast": (plain, torch.bfloat16),
    "fp16 autocast": (plain, torch.float16),
    "bf16 behind the trained layer": (Half, None),
    "autocast within the module": (AutocastInside, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mean_below_float32_is_refused_and_a_sum_is_not(case):
    make, autocast = CASES[case]
    x = torch.randn(5, 4)
    module = make()
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(PrivacyError, match=r"static_batch=.*loss_reduction='sum'"):
        step(module, optimizer_of(module, "mean"), x, "mean", autocast)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    module = make()
    step(module, optimizer_of(module, "sum"), x, "sum", autocast)


def test_a_mean_in_float32_goes_on():
    module = plain()
    step(module, optimizer_of(module, "mean"), torch.randn(5, 4), "mean")


@pytest.mark.parametrize("static_batch", [None, 4])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_loader_whose_batches_have_one_size_may_round(static_batch, in_pieces):
    module = plain().train()
    module, optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        static_batch=static_batch,
    )

    def train(batches) -> None:
        for (x,) in batches:
            step(module, optimizer, x, "mean", torch.bfloat16)

    def run() -> None:
        if in_pieces:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
            ) as pieces:
                train(pieces)
        else:
            train(loader)

    if static_batch is None:
        with pytest.raises(PrivacyError, match="static_batch="):
            run()
    else:
        run()


@dataclass
class Output:
    """What a module may give that torch's trees do not know."""

    sample: Tensor


class InADataclass(Half):
    def forward(self, x):
        return Output(super().forward(x))


def take(module, loss, x) -> RecordGrads:
    capture = Capture(module.train())
    loss(module(x)).backward()
    return capture.take()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_below_float32_behind_the_module_is_refused(dtype):
    batch = take(plain(), lambda y: (y.to(dtype) - 1).square().sum(1).mean(), torch.randn(5, 4))
    with pytest.raises(PrivacyError, match="the loss too"):
        batch.check_precision()


def test_half_precision_is_seen_behind_any_output():
    batch = take(InADataclass(), lambda y: y.sample.square().mean(), torch.randn(5, 4))
    with pytest.raises(PrivacyError, match="static_batch="):
        batch.check_precision()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_are_kept_below_float32_are_those_of_a_sum(reduction):
    module = plain().train()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(module, dtype=torch.bfloat16).parameters, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4.0,
        loss_reduction=reduction,
    )
    refused = pytest.raises(PrivacyError, match="loss_reduction='sum'")
    with refused if reduction == "mean" else nullcontext():
        step(module, optimizer, torch.randn(5, 4), reduction)


@pytest.mark.parametrize("how", ["matmul", "conv"])
def test_products_that_round_float32_are_seen(how):
    part = getattr(torch.backends.mkldnn, how)
    before = part.fp32_precision
    part.fp32_precision = "bf16"
    try:
        batch = take(plain(), lambda y: y.square().mean(), torch.randn(5, 4))
    finally:
        part.fp32_precision = before
    with pytest.raises(PrivacyError, match="set_float32_matmul_precision"):
        batch.check_precision()


@pytest.mark.parametrize("n_rows", [1, 3, 4, 6, 64, 100])
@pytest.mark.parametrize(
    "loss",
    [
        lambda y: y.mean(),
        lambda y: -y.sum(1).mean(),
        lambda y: (3 * y).sum(1).mean(),
        lambda y: y.abs().mean(),
        lambda y: y.relu().mean(),
        lambda y: (y - 0.3).square().mean(),
        lambda y: torch.zeros_like(y).mean() + 0 * y.mean(),
    ],
    ids=["mean", "critic", "thrice", "absolute", "hinge", "square", "zero"],
)
def test_a_loss_in_float32_is_not_taken_for_a_rounded_one(loss, n_rows):
    take(plain(), loss, torch.randn(n_rows, 4)).check_precision()
