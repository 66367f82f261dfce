"""One training step of the shipped UNet with LoRA: non-private, ours, and Opacus' `hooks`.

pytest bench/ --benchmark-only

A step is forward, backward, clipping, noise and update on one batch. Before anything is timed, the
two private implementations must agree on the update without noise. Read the ratios of one run:
absolute times on a shared CPU say little.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dpengine import Capture, DPOptimizer, adapter
from dpengine.base import load_base
from dpengine.models import denoising_losses

MAX_GRAD_NORM = 0.01
IMPLS = ("non-private", "dpengine", "opacus hooks")


def lora_pipeline():
    """The base model with an adapter whose lora_b is not zero."""
    pipeline = load_base("default")
    pipeline.class_embedding.requires_grad_(False)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    adapter.add_lora(pipeline.unet, rank=4, alpha=4.0, target_modules=targets, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, param in pipeline.unet.named_parameters():
        if "lora_B" in name:
            param.data = 0.1 * torch.randn(param.shape, generator=generator)
    pipeline.unet.train()
    return pipeline


def make_step(
    impl: str, batch_size: int, noise_multiplier: float, learning_rate: float
) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """A training step on one fixed batch, and the tensors it updates."""
    pipeline = lora_pipeline()
    unet = pipeline.unet
    params = [param for param in unet.parameters() if param.requires_grad]
    inner = torch.optim.SGD(params, lr=learning_rate)
    private = {
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": MAX_GRAD_NORM,
        "expected_batch_size": batch_size,
    }
    if impl == "dpengine":
        Capture(unet)
        optimizer = DPOptimizer(inner, **private)
    elif impl == "opacus hooks":
        opacus = pytest.importorskip("opacus", reason="pip install -e '.[bench]'")
        unet = opacus.GradSampleModule(unet)
        optimizer = opacus.optimizers.DPOptimizer(inner, **private)
    else:
        optimizer = inner

    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, 1, 8, 8)
    latents, diffusion_noise = (torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.arange(batch_size) % 10
    timesteps = torch.randint(1000, (batch_size,), generator=generator)

    def step() -> None:
        losses = denoising_losses(
            unet,
            pipeline.scheduler,
            pipeline.class_embedding,
            latents,
            labels,
            timesteps,
            diffusion_noise,
        )
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, params


def update(impl: str, batch_size: int) -> torch.Tensor:
    """What one step without noise, at learning rate 1, takes from the weights."""
    step, params = make_step(impl, batch_size, noise_multiplier=0.0, learning_rate=1.0)
    before = [param.detach().clone() for param in params]
    step()
    moved = [(old - param.detach()).flatten() for old, param in zip(before, params, strict=True)]
    return torch.cat(moved)


@pytest.fixture(autouse=True)
def quiet_opacus():
    """Opacus' hooks warn that a full backward hook fires without input gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.mark.parametrize("batch_size", [16, 256])
@pytest.mark.parametrize("impl", IMPLS)
def test_step(benchmark, impl, batch_size):
    benchmark.group = f"training step, {batch_size} records"
    if impl != "non-private":
        ours, theirs = update("dpengine", batch_size), update("opacus hooks", batch_size)
        # Opacus divides by norm + 1e-6 and sums in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    step, _ = make_step(impl, batch_size, noise_multiplier=1.0, learning_rate=1e-3)
    benchmark.pedantic(step, rounds=15, warmup_rounds=3)
