"""PixArt-α and PixArt-Σ: a transformer on latents, under the tokens of T5."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import check_answer, check_constants, check_vae, whole_number
from .noising import DDPM_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline


@dataclass(frozen=True)
class PixArt:
    """An ``Objective`` whose texts are prompts.

    Its answer has a second half, a learned variance, which is not trained and not sampled by.
    """

    pipeline: "PixArtAlphaPipeline | PixArtSigmaPipeline"
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
        tokens, mask, _, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, device=self.denoiser.device
        )
        return {"tokens": tokens, "token_mask": mask}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:  # an image of its own size, not stretched
            added["resolution"] = noisy.new_full((len(noisy), 2), self.image_size)
            added["aspect_ratio"] = noisy.new_ones(len(noisy), 1)
        answer = self.denoiser(
            noisy,
            encoder_hidden_states=conditions["tokens"],
            encoder_attention_mask=conditions["token_mask"],
            timestep=steps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return answer[:, : noisy.shape[1]]

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        return prompted.draw(
            self.pipeline,
            texts,
            self.image_size,
            num_inference_steps,
            generator,
            use_resolution_binning=False,
            clean_caption=False,  # as it is encoded for training
        )


def make(
    pipeline: "PixArtAlphaPipeline | PixArtSigmaPipeline",
    texts: Sequence[str] = (),
    image_size: int | None = None,
) -> PixArt:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    config = pipeline.transformer.config
    check_vae(pipeline.vae, config.in_channels, "transformer")
    check_answer(config)
    check_constants(pipeline.vae, ("shift_factor", "latents_mean", "latents_std"))
    default = whole_number("transformer", "sample_size", config.sample_size)
    size = prompted.fit_size(pipeline.vae, default, image_size, config.patch_size)
    return PixArt(pipeline, tuple(texts), size)


ALPHA = Family(
    pipeline="PixArtAlphaPipeline",
    make=make,
    components={
        "transformer": ("diffusers.PixArtTransformer2DModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in DDPM_SCHEDULERS),
        "vae": ("diffusers.AutoencoderKL",),
        "text_encoder": ("transformers.T5EncoderModel",),
        "tokenizer": prompted.T5_TOKENIZERS,
    },
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),
)
SIGMA = replace(ALPHA, pipeline="PixArtSigmaPipeline")
