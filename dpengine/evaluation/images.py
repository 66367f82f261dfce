"""Images drawn from released weights and public seeds, and their file."""

import io
from pathlib import Path

import numpy as np
import torch

from ..models import Objective, family_of
from ..models.base import load_base, quiet
from ..run import durable
from ..run.progress import percent

_BATCH = 250
_BATCH_VALUES = 2**20
"""Pixel values of a batch at most, so that memory does not grow with the size of the images."""


def load_alone(base: str, prompts: tuple[str, ...] = ()) -> Objective:
    """A base model without adapter. Raises ValueError where it wants prompts and has none."""
    pipeline = load_base(base)
    family = family_of(pipeline)
    if family.follows_prompts != bool(prompts):
        rule = (
            "follows prompts; give --prompt" if not prompts else "knows classes; leave out prompt"
        )
        raise ValueError(f"base {base!r} {rule}")
    return family.make(pipeline, prompts)


def draw_images(
    objective: Objective, labels: torch.Tensor, *, sampler_steps: int, seed: int
) -> np.ndarray:
    """One image of the text of each label, from the model's weights and a public seed.

    labels int64 [N] -> uint8 [N, H, W], or [N, H, W, C] where there is more than one channel.
    """
    objective.denoiser.eval()
    generator = torch.Generator().manual_seed(seed)
    values = objective.image_channels * objective.image_size**2
    batch = max(1, min(_BATCH, _BATCH_VALUES // values))
    texts = [[objective.texts[i] for i in chunk.tolist()] for chunk in labels.split(batch)]
    with quiet():
        pixels = [
            _to_pixels(objective.draw(chunk, sampler_steps, generator))
            for chunk in percent(texts, "Drawing images")
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
