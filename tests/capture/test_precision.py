"""Half precision: autocast, and a half-precision base, under float32 adapters."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dpengine import Capture
from dpengine.capture.slots import SeparateGrads, Slab
from dpengine.mechanism.clipping import Flat

N, DRAWS, SCALE = 16, 2, 64.0
"""``SCALE``: the constant loss scale that keeps float16 gradients from underflow."""


class Block(nn.Module):
    """Convolutions, norms and linear layers around a residual, all in one type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.to_v = nn.Linear(8, 8)
        self.to_out = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv_in(x)
        x = x + self.conv(nn.functional.silu(self.group_norm(x)))
        x = x.flatten(2).mT
        x = x + self.to_out(nn.functional.silu(self.to_v(self.norm(x))))
        return x


def block(base: torch.dtype, train: tuple[str, ...] = ()) -> nn.Module:
    """A base of one type with float32 adapters; ``train``: layers of it in float32, in full."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Block().to(base)
        module.group_norm.float()  # torch's norms take float32 parameters beside any input
        module.norm.float()
        config = LoraConfig(r=4, lora_alpha=6.0, target_modules=["conv", "to_v", "to_out"])
        module = inject_adapter_in_model(config, module)
        for name in train:
            module.get_submodule(name).float().requires_grad_(True)
        with torch.no_grad():
            for param in module.parameters():
                if param.requires_grad:
                    param.data = param.data.float()
                    param.add_(0.2 * torch.randn(param.shape))
    return module.train()


def losses(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    output = module(x)
    wide = output.double() if x.dtype == torch.float64 else output.float()
    return (wide - target).square().flatten(1).mean(1)


def context(autocast: torch.dtype | None):
    return nullcontext() if autocast is None else torch.autocast("cpu", autocast)


def alone(module, x, target, autocast=None) -> list[Tensor]:
    """One ordinary backward pass for each record."""
    params = [param for param in module.parameters() if param.requires_grad]
    grads = []
    for start in range(0, len(x), DRAWS):
        own = slice(start, start + DRAWS)
        with context(autocast):
            loss = losses(module, x[own], target[own]).mean()
        grads.append(torch.autograd.grad(SCALE * loss, params))
    return [torch.stack(column) / SCALE for column in zip(*grads, strict=True)]


def captured(module, x, target, autocast, holder) -> list[Tensor]:
    capture = Capture(module, draws_per_record=DRAWS)
    capture._holder = partial(holder, capture.layout)
    with context(autocast):
        loss = losses(module, x, target).sum() / DRAWS
    (SCALE * loss).backward()
    batch = capture.take()
    grads = [grad / SCALE for grad in batch.per_record_grads]
    capture.detach()
    assert type(batch.grads) is holder
    return grads


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(left, right, strict=True)]
    return float(sum(squares)) ** 0.5


def check(module, x, target, autocast) -> None:
    exact = alone(copy.deepcopy(module).double(), x.double(), target.double())
    eager = alone(module, x, target, autocast)
    for holder in (SeparateGrads, Slab):
        ours = captured(module, x, target, autocast, holder)
        assert all(grad.dtype == torch.float32 for grad in ours)
        assert 0 < distance(ours, exact) <= 2 * distance(eager, exact)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N * DRAWS, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def target() -> Tensor:
    return torch.randn(N * DRAWS, 16, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_adapters_under_autocast(x, target, autocast, base):
    """At most twice as wrong as ordinary backward passes of the same types."""
    check(block(base), x, target, autocast)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_full_training_under_autocast(x, target, autocast):
    module = block(torch.float32, ("conv_in", "group_norm", "norm"))
    check(module, x, target, autocast)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_without_autocast(x, target, base):
    check(block(base), x.to(base), target, None)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_output_type_is_that_of_the_plain_module(x, autocast, base):
    module = block(base, ("group_norm", "norm", "conv_in"))
    with context(autocast), torch.no_grad():
        plain = [output.dtype for output in _outputs(module, x)]
    Capture(module)
    with context(autocast):
        assert [output.dtype for output in _outputs(module, x)] == plain


def _outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    found = []
    hooks = [
        child.register_forward_hook(lambda _, args, output: found.append(output))
        for child in module.children()
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    assert len(found) == 6
    return found


def test_the_fallback_repeats_the_autocast_of_its_forward(x):
    """Backward runs outside the context, and must compute in the same types."""
    seen = []

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            x = x.flatten(2).mT @ self.scale
            seen.append(x.dtype)
            return x

    capture = Capture(Scaled().train(), draws_per_record=DRAWS)
    with torch.autocast("cpu", torch.bfloat16):
        output = capture.module(x)
    output.float().square().sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert capture.take().per_record_grads[0].dtype == torch.float32


@pytest.mark.parametrize("holder", [SeparateGrads, Slab])
def test_a_bfloat16_slab_is_rounded_before_its_norm_is_taken(x, target, holder):
    """The bound holds for what is stored: C at most, and the rounding of each element alone."""
    module = block(torch.float32)
    full = captured(module, x, target, None, holder)
    capture = Capture(module, draws_per_record=DRAWS, dtype=torch.bfloat16)
    capture._holder = partial(holder, capture.layout)
    (losses(module, x, target).sum() * (SCALE / DRAWS)).backward()
    batch = capture.take()
    for rounded, exact in zip(batch.per_record_grads, full, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, (SCALE * exact).bfloat16())
    bound = 1e-3
    for n in range(N):
        one = torch.arange(N) == n
        total = Flat(bound).clip_and_sum(batch.grads.whole, one).values
        assert 0.99 * bound < float(total.norm()) <= bound * (1 - 2**-24)
