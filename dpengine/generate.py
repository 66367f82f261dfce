"""Draw images from a run's released adapter, or from the base model alone.

python -m dpengine.generate --run DIR --num 1000 --output FILE.npz
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from . import cli, durable, run_folder
from .base import load_base
from .errors import positive_int
from .models import ClassConditionalPipeline
from .progress import percent, phase
from .run_folder import RunFolder
from .settings import MOST_IMAGES, UserPath

_BATCH = 250
_BATCH_VALUES = 2**20
"""Pixel values of a batch at most, so that memory does not grow with the size of the images."""


@dataclass(frozen=True)
class GenerateSettings:
    """Draw labelled images from a run, or from a base model alone, into an .npz file."""

    output: UserPath
    """New .npz to write: `images` uint8 [N, H, W] or [N, H, W, C], and `labels` int64 [N]."""
    run: UserPath | None = None
    """Folder of a finished run."""
    base: UserPath | None = None
    """Base model alone: `default`, a folder or a hub id."""
    num: int = 2000
    """Number of images, spread evenly over the classes."""
    sampler_steps: int = 10
    """Denoising steps for each image."""
    seed: int = 0
    """Seed of the images. Public: the weights are released."""


def draw_images(
    pipeline: ClassConditionalPipeline, labels: torch.Tensor, *, sampler_steps: int, seed: int
) -> np.ndarray:
    """One image for each label, from the pipeline's weights and a public seed.

    labels int64 [N] -> uint8 [N, H, W], or [N, H, W, C] where there is more than one channel.
    """
    pipeline.unet.eval()
    generator = torch.Generator().manual_seed(seed)
    values = pipeline.image_channels * pipeline.image_size**2
    batch = max(1, min(_BATCH, _BATCH_VALUES // values))
    pixels = [
        _to_pixels(pipeline(chunk, num_inference_steps=sampler_steps, generator=generator))
        for chunk in percent(labels.split(batch), "Drawing images")
    ]
    return np.concatenate(pixels)


def _to_pixels(images: torch.Tensor) -> np.ndarray:
    """float [B, C, H, W] in [-1, 1] to uint8 [B, H, W], or [B, H, W, C] where C is above 1."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def even_labels(num: int, num_classes: int) -> torch.Tensor:
    """Labels 0, 1, ..., 0, 1, ... : each class equally often, as no private count decides.  [N]"""
    return torch.arange(num) % num_classes


def save_images(
    file: Path, images: np.ndarray, labels: torch.Tensor, *, sampler_steps: int, seed: int
) -> None:
    """Write an .npz that ``data.load`` reads, with the numbers that its images were drawn by."""
    content = io.BytesIO()
    np.savez_compressed(
        content, images=images, labels=labels.numpy(), sampler_steps=sampler_steps, seed=seed
    )
    durable.write(file, content.getvalue())


def load_run(folder: RunFolder) -> ClassConditionalPipeline:
    """The base model of a run with its released adapter."""
    settings = run_folder.read_settings(folder)
    if not folder.report.exists():
        raise ValueError(
            f"run {str(folder.path)!r} is unfinished; finish it with "
            f"python -m dpengine.finetune --resume {shlex.quote(str(folder.path))}"
        )
    pipeline = load_base(settings.model.base)
    try:
        pipeline.load_lora_weights(
            folder.path, weight_name=folder.adapter.name, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{str(folder.adapter)!r} is no adapter of the run's base model "
            f"({next(iter(str(error).splitlines()), '')}); restore it, or the base"
        ) from error
    return pipeline


def generate(settings: GenerateSettings) -> None:
    """Run the command."""
    positive_int(num=settings.num, sampler_steps=settings.sampler_steps)
    if settings.num > MOST_IMAGES:
        raise ValueError(
            f"num must be at most {MOST_IMAGES:,}, got {settings.num}; draw more with other seeds"
        )
    if not -(2**63) <= settings.seed < 2**63:
        raise ValueError(f"seed must lie between -2**63 and 2**63 - 1, got {settings.seed}")
    if (settings.run is None) == (settings.base is None):
        raise ValueError("give either --run DIR or --base NAME, one of the two")
    output = durable.check_new_file("output", settings.output, ".npz")
    phase("Loading the model")
    if settings.run is not None:
        pipeline = load_run(RunFolder(Path(settings.run)))
    else:
        pipeline = load_base(settings.base)
    labels = even_labels(settings.num, len(pipeline.class_embedding.config.class_names))
    drawn = {"sampler_steps": settings.sampler_steps, "seed": settings.seed}
    phase(f"Drawing {settings.num:,} images")
    images = draw_images(pipeline, labels, **drawn)
    durable.check_new_file("output", settings.output, ".npz")  # it took a while
    save_images(output, images, labels, **drawn)
    print(f"{settings.num} images written to {cli.printable(str(output))}")


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.generate", GenerateSettings, generate, args)


if __name__ == "__main__":
    raise SystemExit(main())
