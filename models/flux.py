"""FLUX.1: a transformer on packed latents, by flow matching, with guidance as an input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import check_flow_vae, check_vae
from .noising import FLOW_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import FluxPipeline

_GUIDANCE = 3.5
"""What diffusers' pipeline and its scripts give to models that take their guidance as an input."""

_LATENTS = 128
"""Latents of a side, where no size is asked for: the model's own files do not say it."""


@dataclass(frozen=True)
class Flux:
    """An ``Objective`` whose texts are prompts; latents are kept as images, [c, h, w]."""

    pipeline: "FluxPipeline"
    texts: tuple[str, ...]
    image_size: int

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def image_channels(self) -> int:
        return self.pipeline.vae.config.in_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return prompted.latent_shape(self.pipeline.vae, self.image_size)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        return latents.encode(self.pipeline.vae, image)

    @torch.no_grad()
    def condition(self, texts: Sequence[str]) -> Batch:
        tokens, pooled, _ = self.pipeline.encode_prompt(list(texts), device=self.denoiser.device)
        return {"tokens": tokens, "pooled": pooled}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        n_rows, _, height, width = noisy.shape
        tokens, guidance = conditions["tokens"], None
        if self.denoiser.config.guidance_embeds:
            guidance = noisy.new_full((n_rows,), _GUIDANCE)
        answer = self.denoiser(
            hidden_states=pack(noisy),
            timestep=steps / 1000,
            guidance=guidance,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=tokens,
            txt_ids=noisy.new_zeros(tokens.shape[1], 3),
            img_ids=_places(height // 2, width // 2, noisy),
            return_dict=False,
        )[0]
        return unpack(answer, height, width)

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        return prompted.draw(self.pipeline, texts, self.image_size, num_inference_steps, generator)


def pack(images: Tensor) -> Tensor:
    """Squares of 2 x 2 latents as tokens: [B, c, h, w] to [B, h/2 · w/2, 4c]."""
    n_rows, channels, height, width = images.shape
    squares = images.view(n_rows, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n_rows, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``."""
    n_rows, _, channels = tokens.shape
    squares = tokens.view(n_rows, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n_rows, channels // 4, height, width)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token, behind a zero.  [height · width, 3]"""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    grid = torch.cartesian_prod(rows, columns).view(-1, 2)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def make(
    pipeline: "FluxPipeline", texts: Sequence[str] = (), image_size: int | None = None
) -> Flux:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    config = pipeline.transformer.config
    if config.in_channels % 4 or (config.out_channels or config.in_channels) != config.in_channels:
        raise ValueError("the transformer must answer with as many channels as it takes, packed")
    check_vae(pipeline.vae, config.in_channels // 4, "transformer")
    check_flow_vae(pipeline.vae)
    return Flux(pipeline, tuple(texts), prompted.fit_size(pipeline.vae, _LATENTS, image_size, 2))


FAMILY = Family(
    pipeline="FluxPipeline",
    make=make,
    components={
        "transformer": ("diffusers.FluxTransformer2DModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in FLOW_SCHEDULERS),
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": prompted.CLIP_TOKENIZERS,
        "text_encoder_2": ("transformers.T5EncoderModel",),
        "tokenizer_2": prompted.T5_TOKENIZERS,
        **prompted.IMAGE_PROMPTS,
    },
    optional=tuple(prompted.IMAGE_PROMPTS),
    ignored=tuple(prompted.IMAGE_PROMPTS),
    target_modules=(
        *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
)
