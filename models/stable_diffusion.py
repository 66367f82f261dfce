"""Stable Diffusion 1.x and 2.x: a UNet on latents, under the tokens of one text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import UNUSED_INPUTS, check_constants, check_unet, check_vae, whole_number
from .noising import DDPM_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class StableDiffusion:
    """An ``Objective`` whose texts are prompts."""

    pipeline: "StableDiffusionPipeline"
    texts: tuple[str, ...]
    image_size: int

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

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
        device = self.pipeline.text_encoder.device
        return {"tokens": self.pipeline.encode_prompt(list(texts), device, 1, False)[0]}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        tokens = conditions["tokens"]
        return self.denoiser(noisy, steps, encoder_hidden_states=tokens, return_dict=False)[0]

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        return prompted.draw(self.pipeline, texts, self.image_size, num_inference_steps, generator)


def make(
    pipeline: "StableDiffusionPipeline", texts: Sequence[str] = (), image_size: int | None = None
) -> StableDiffusion:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    check_unet(pipeline.unet, UNUSED_INPUTS)
    check_vae(pipeline.vae, pipeline.unet.config.in_channels)
    check_constants(pipeline.vae, ("shift_factor", "latents_mean", "latents_std"))
    default = whole_number("unet", "sample_size", pipeline.unet.config.sample_size)
    size = prompted.fit_size(pipeline.vae, default, image_size)
    return StableDiffusion(pipeline, tuple(texts), size)


FAMILY = Family(
    pipeline="StableDiffusionPipeline",
    make=make,
    components={
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in DDPM_SCHEDULERS),
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": prompted.CLIP_TOKENIZERS,
        "safety_checker": ("stable_diffusion.StableDiffusionSafetyChecker",),
        **prompted.IMAGE_PROMPTS,
    },
    optional=("safety_checker", *prompted.IMAGE_PROMPTS),
    ignored=("safety_checker", *prompted.IMAGE_PROMPTS),
    options={"requires_safety_checker": False},
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),
)
