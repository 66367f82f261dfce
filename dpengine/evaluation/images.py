"""Images drawn from released weights and public seeds, and their file."""

import io
from pathlib import Path

import numpy as np
import torch

from ..models import ClassConditionalPipeline
from ..run import durable
from ..run.progress import percent

_BATCH = 250
_BATCH_VALUES = 2**20
"""Pixel values of a batch at most, so that memory does not grow with the size of the images."""


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
