"""Trains the public base model on rendered digits, from a fixed seed, on the CPU.

python -m dpengine.models.pretrain [--output DIR]
"""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import class_conditional
from .glyphs import CLASS_NAMES, glyphs
from .noising import make_path
from .objective import row_losses
from .pipeline import DEFAULT_BASE, ClassConditionalPipeline, ClassEmbedding


def untrained_pipeline(
    image_size: int = 8, block_out_channels: tuple[int, int] = (32, 64)
) -> ClassConditionalPipeline:
    """The base model's networks for grey images, at random initial weights (global generator)."""
    unet = UNet2DConditionModel(
        sample_size=image_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        # Attention at half the size only, on the way up: DP training pays for every draw, and the
        # backward pass ends at the first attention block.
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        # diffusers reads this as the number of heads.
        attention_head_dim=2,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return ClassConditionalPipeline(unet, scheduler, ClassEmbedding(32, CLASS_NAMES))


def pretrain(
    num_steps: int = 2500,
    batch_size: int = 128,
    num_glyphs: int = 40_000,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.996,
    seed: int = 0,
    render: Callable[[int, torch.Generator], tuple[Tensor, Tensor]] = glyphs,
    block_out_channels: tuple[int, int] = (32, 64),
) -> ClassConditionalPipeline:
    """A pipeline trained on glyphs, with averaged weights; the same for the same arguments.

    render: ``render(count, generator)`` makes the public images [count, 1, S, S] in [-1, 1] and
        their labels [count].
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = render(num_glyphs, generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = untrained_pipeline(images.shape[-1], block_out_channels)
    objective, path = class_conditional.make(pipeline), make_path(pipeline.scheduler)
    networks = torch.nn.ModuleList([pipeline.unet, pipeline.class_embedding])
    average = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    optimizer = torch.optim.AdamW(networks.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps)
    for _ in tqdm(range(num_steps), desc="pretrain", mininterval=5):
        rows = torch.randint(num_glyphs, (batch_size,), generator=generator)
        # One timestep from each of batch_size equal slices: less variance than free draws.
        slices = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
        timesteps = (slices / batch_size * len(path)).long()
        diffusion_noise = torch.randn(batch_size, *images.shape[1:], generator=generator)
        batch = {"latents": images[rows], "diffusion_noise": diffusion_noise}
        batch |= {"times": timesteps, "labels": labels[rows]}
        losses = row_losses(objective, path, batch)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(networks)
    networks.load_state_dict(average.module.state_dict())
    networks.eval()
    return pipeline


def main() -> None:
    parser = ArgumentParser(description="Train the public base model on rendered digits.")
    parser.add_argument("--output", type=Path, default=DEFAULT_BASE, help="folder to write")
    output = parser.parse_args().output
    pretrain().save_pretrained(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
