"""Stable Diffusion 3 and 3.5: a transformer on latents, by flow matching, under three encoders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import check_flow_vae, check_vae, whole_number
from .noising import FLOW_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import StableDiffusion3Pipeline


@dataclass(frozen=True)
class StableDiffusion3:
    """An ``Objective`` whose texts are prompts; the third text encoder, T5, may be absent.

    Its loss is that of the velocity (Esser et al. 2024). diffusers' DreamBooth script multiplies it
    by σ², as it takes the error of the image (`precondition_outputs`).
    """

    pipeline: "StableDiffusion3Pipeline"
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
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self.denoiser.device,
            do_classifier_free_guidance=False,
        )
        return {"tokens": tokens, "pooled": pooled}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        return self.denoiser(
            noisy,
            timestep=steps,
            encoder_hidden_states=conditions["tokens"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        return prompted.draw(self.pipeline, texts, self.image_size, num_inference_steps, generator)


def make(
    pipeline: "StableDiffusion3Pipeline", texts: Sequence[str] = (), image_size: int | None = None
) -> StableDiffusion3:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    config = pipeline.transformer.config
    check_vae(pipeline.vae, config.in_channels, "transformer")
    if config.out_channels != config.in_channels:
        raise ValueError("the transformer's in_channels and out_channels must be equal")
    check_flow_vae(pipeline.vae)
    default = whole_number("transformer", "sample_size", config.sample_size)
    size = prompted.fit_size(pipeline.vae, default, image_size, config.patch_size)
    return StableDiffusion3(pipeline, tuple(texts), size)


FAMILY = Family(
    pipeline="StableDiffusion3Pipeline",
    make=make,
    components={
        "transformer": ("diffusers.SD3Transformer2DModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in FLOW_SCHEDULERS),
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.CLIPTextModelWithProjection",),
        "tokenizer": prompted.CLIP_TOKENIZERS,
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
        "tokenizer_2": prompted.CLIP_TOKENIZERS,
        "text_encoder_3": ("transformers.T5EncoderModel",),
        "tokenizer_3": prompted.T5_TOKENIZERS,
        **prompted.IMAGE_PROMPTS,
    },
    optional=("text_encoder_3", "tokenizer_3", *prompted.IMAGE_PROMPTS),
    ignored=tuple(prompted.IMAGE_PROMPTS),
    target_modules=(
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
    ),
    time_law="logit-normal",
)
