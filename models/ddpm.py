"""A UNet on pixels, as of DDPM's pipeline: of numbered classes, or of images of one kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checks import check_own_size, check_unet, whole_number
from .noising import DDPM_SCHEDULERS
from .objective import Batch, Family
from .pipeline import denoise

if TYPE_CHECKING:
    from diffusers import DDPMPipeline


@dataclass(frozen=True)
class PixelUNet:
    """An ``Objective`` whose texts are the numbers of its classes, or say that there are none."""

    pipeline: "DDPMPipeline"
    texts: tuple[str, ...]

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def image_channels(self) -> int:
        return self.denoiser.config.in_channels

    @property
    def image_size(self) -> int:
        return self.denoiser.config.sample_size

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.image_channels, self.image_size, self.image_size

    def encode(self, image: Tensor) -> Tensor:
        return image

    def condition(self, texts: Sequence[str]) -> Batch:
        if self.denoiser.config.num_class_embeds is None:
            return {}
        return {"labels": torch.tensor([self.texts.index(text) for text in texts])}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        labels = conditions.get("labels")
        return self.denoiser(noisy, steps, class_labels=labels, return_dict=False)[0]

    @torch.no_grad()
    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        device = self.denoiser.device
        conditions = {n: t.to(device) for n, t in self.condition(texts).items()}

        def answer(sample: Tensor, step: Tensor) -> Tensor:
            return self.predict(sample, step, conditions)

        like = torch.empty(len(texts), *self.latent_shape, device=device)
        sample = denoise(self.pipeline.scheduler, answer, like, num_inference_steps, generator)
        return sample.clamp(-1, 1)


def make(
    pipeline: "DDPMPipeline", texts: Sequence[str] = (), image_size: int | None = None
) -> PixelUNet:
    """Raise ValueError for a configuration that training or sampling would not follow."""
    unet = pipeline.unet
    check_unet(unet, ("class_embed_type",))
    check_own_size(whole_number("unet", "sample_size", unet.config.sample_size), image_size)
    if unet.config.in_channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {unet.config.in_channels}")
    num_classes = unet.config.num_class_embeds
    names = ("images",) if num_classes is None else tuple(map(str, range(num_classes)))
    return PixelUNet(pipeline, names)


FAMILY = Family(
    pipeline="DDPMPipeline",
    make=make,
    components={
        "unet": ("diffusers.UNet2DModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in DDPM_SCHEDULERS),
    },
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),
    follows_prompts=False,
)
