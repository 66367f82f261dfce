"""Stable Diffusion XL: a UNet on latents, under two text encoders and the sizes of the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import UNUSED_INPUTS, check_constants, check_unet, check_vae, whole_number
from .noising import DDPM_SCHEDULERS, EDM_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import StableDiffusionXLPipeline


@dataclass(frozen=True)
class StableDiffusionXL:
    """An ``Objective`` whose texts are prompts.

    Every image is said to have been of the size that it has, and not cropped: what its file was
    says something about its record.
    """

    pipeline: "StableDiffusionXLPipeline"
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
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=self.denoiser.device, do_classifier_free_guidance=False
        )
        size = (self.image_size, self.image_size)
        sizes = torch.tensor([(*size, 0, 0, *size)] * len(texts), dtype=tokens.dtype)
        return {"tokens": tokens, "pooled": pooled, "sizes": sizes.to(tokens.device)}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}
        return self.denoiser(
            noisy,
            steps,
            encoder_hidden_states=conditions["tokens"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        return prompted.draw(self.pipeline, texts, self.image_size, num_inference_steps, generator)


def make(
    pipeline: "StableDiffusionXLPipeline", texts: Sequence[str] = (), image_size: int | None = None
) -> StableDiffusionXL:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    check_unet(pipeline.unet, set(UNUSED_INPUTS) - {"addition_embed_type"})
    if pipeline.unet.config.addition_embed_type != "text_time":
        raise ValueError(
            "the unet's addition_embed_type must be 'text_time', got "
            f"{pipeline.unet.config.addition_embed_type!r}"
        )
    check_vae(pipeline.vae, pipeline.unet.config.in_channels)
    check_constants(pipeline.vae, ("shift_factor",))
    default = whole_number("unet", "sample_size", pipeline.unet.config.sample_size)
    size = prompted.fit_size(pipeline.vae, default, image_size)
    return StableDiffusionXL(pipeline, tuple(texts), size)


FAMILY = Family(
    pipeline="StableDiffusionXLPipeline",
    make=make,
    components={
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in (*DDPM_SCHEDULERS, *EDM_SCHEDULERS)),
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": prompted.CLIP_TOKENIZERS,
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        "tokenizer_2": prompted.CLIP_TOKENIZERS,
        **prompted.IMAGE_PROMPTS,
    },
    optional=tuple(prompted.IMAGE_PROMPTS),
    ignored=tuple(prompted.IMAGE_PROMPTS),
    options={"force_zeros_for_empty_prompt": None, "add_watermarker": False},
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),
)
