"""One training step of the shipped UNet with LoRA: non-private, ours, and Opacus' `hooks`.

pytest bench/ --benchmark-only

A step is forward, backward, clipping, noise and update on one batch. Before anything is timed, the
two private implementations must agree on the update without noise. Read the ratios of one run:
absolute times on a shared CPU say little; `bench.engine` measures ratios.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dpengine import adapter
from dpengine.base import load_base
from dpengine.models import denoising_losses

from .training import IMPLS, TARGETS, Task, quiet, start, update


def shipped() -> Task:
    """The base model with an adapter whose lora_b is not zero, and its class-conditional loss."""
    pipeline = load_base("default")
    pipeline.class_embedding.requires_grad_(False)

    def make_model() -> nn.Module:
        unet = load_base("default").unet
        adapter.add_lora(unet, rank=4, alpha=4.0, target_modules=TARGETS, seed=0)
        generator = torch.Generator().manual_seed(0)
        for name, param in unet.named_parameters():
            if "lora_B" in name:
                param.data = 0.1 * torch.randn(param.shape, generator=generator)
        return unet

    def inputs(n_rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        latents, noise = (torch.randn(n_rows, 1, 8, 8, generator=generator) for _ in range(2))
        timesteps = torch.randint(1000, (n_rows,), generator=generator)
        return latents, torch.arange(n_rows) % 10, timesteps, noise

    def loss(unet: nn.Module, *rows: Tensor) -> Tensor:
        scheduler, embedding = pipeline.scheduler, pipeline.class_embedding
        return denoising_losses(unet, scheduler, embedding, *rows).mean()

    return Task(make_model, loss, inputs)


@pytest.fixture(autouse=True)
def quiet_opacus():
    with quiet():
        yield


@pytest.mark.parametrize("batch_size", [16, 256])
@pytest.mark.parametrize("impl", IMPLS)
def test_step(benchmark, impl, batch_size):
    benchmark.group = f"training step, {batch_size} records"
    task = shipped()
    if impl != "non-private":
        pytest.importorskip("opacus", reason="pip install -e '.[bench]'")
        ours, theirs = (update(task, private, batch_size) for private in IMPLS[1:])
        # Opacus divides by norm + 1e-6 and sums in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    sgd = partial(torch.optim.SGD, lr=1e-3)
    training, rows = start(task, impl, sgd, batch_size), task.inputs(batch_size)
    benchmark.pedantic(training.step, rows, rounds=15, warmup_rounds=3)
