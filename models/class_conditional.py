"""The family that ships: a UNet under one learned token per class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import UNUSED_INPUTS, check_own_size, check_unet, check_vae, whole_number
from .noising import DDPM_SCHEDULERS
from .objective import Batch, Family
from .pipeline import ClassConditionalPipeline


@dataclass(frozen=True)
class ClassConditional:
    """An ``Objective`` whose texts are the names of its classes."""

    pipeline: ClassConditionalPipeline
    texts: tuple[str, ...]

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def image_channels(self) -> int:
        return self.pipeline.image_channels

    @property
    def image_size(self) -> int:
        return self.pipeline.image_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config = self.pipeline.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def encode(self, image: Tensor) -> Tensor:
        return self.pipeline.encode(image)

    def condition(self, texts: Sequence[str]) -> Batch:
        return {"labels": torch.tensor([self.texts.index(text) for text in texts])}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        tokens = self.pipeline.class_embedding(conditions["labels"])
        return self.pipeline.unet(noisy, steps, encoder_hidden_states=tokens).sample

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        labels = self.condition(texts)["labels"]
        return self.pipeline(labels, num_inference_steps, generator)


def make(
    pipeline: ClassConditionalPipeline, texts: Sequence[str] = (), image_size: int | None = None
) -> ClassConditional:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    check_unet(pipeline.unet, UNUSED_INPUTS)
    whole_number("unet", "sample_size", pipeline.unet.config.sample_size)
    if pipeline.vae is not None:
        check_vae(pipeline.vae, pipeline.unet.config.in_channels)
    if pipeline.image_channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {pipeline.image_channels}")
    names = pipeline.class_embedding.config.class_names
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names of class_embedding must be texts (strings), got {names[:3]}")
    check_own_size(pipeline.image_size, image_size)
    return ClassConditional(pipeline, tuple(names))


FAMILY = Family(
    pipeline="ClassConditionalPipeline",
    make=make,
    components={
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in DDPM_SCHEDULERS),
        "class_embedding": tuple(
            f"{library}.ClassEmbedding"
            for library in ("dpengine.models.pipeline", "pipeline", "dpengine")
        ),
        "vae": ("diffusers.AutoencoderKL",),
    },
    optional=("vae",),
    target_modules=("to_q", "to_k", "to_v", "to_out.0"),
    follows_prompts=False,
)
