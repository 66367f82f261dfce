"""What the families that follow prompts share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import latents

CLIP_TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
T5_TOKENIZERS = ("transformers.T5Tokenizer", "transformers.T5TokenizerFast")
IMAGE_PROMPTS = {
    "image_encoder": (
        "transformers.CLIPVisionModelWithProjection",
        "transformers.SiglipVisionModel",
    ),
    "feature_extractor": (
        "transformers.CLIPImageProcessor",
        "transformers.CLIPFeatureExtractor",
        "transformers.SiglipImageProcessor",
    ),
}
"""Parts for prompts that are images, which are not used here."""


_PIXELS = 8
"""The pipelines draw images whose sides are multiples of it, whatever their latents."""


def draw(
    pipeline: Any,
    texts: Sequence[str],
    size: int,
    num_inference_steps: int,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """An image of each prompt, as the pipeline itself draws it.  [B, C, size, size] in [-1, 1]"""
    drawn = pipeline(
        prompt=list(texts),
        height=size,
        width=size,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type="pt",
        **options,
    )
    return (2 * drawn.images.float() - 1).clamp(-1, 1)


def fit_size(vae: nn.Module, default: int, asked: int | None, multiple: int = 1) -> int:
    """The size of images: as asked for, or ``default`` latents of a side.

    Raises ValueError where it is no whole number of latents, or of patches of ``multiple``.
    """
    factor = latents.size_factor(vae)
    size = default * factor if asked is None else asked
    step = math.lcm(factor * multiple, _PIXELS)
    if size % step:
        raise ValueError(f"image_size must be a multiple of {step}, got {size}")
    return size


def latent_shape(vae: nn.Module, size: int) -> tuple[int, int, int]:
    """Shape of the latents of one image of ``size`` pixels a side."""
    side = size // latents.size_factor(vae)
    return vae.config.latent_channels, side, side
