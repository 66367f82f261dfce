"""DiT: a transformer on latents, under one class of its own for each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import latents, prompted
from .checks import check_answer, check_constants, check_own_size, check_vae, whole_number
from .noising import DDPM_SCHEDULERS
from .objective import Batch, Family

if TYPE_CHECKING:  # the pipelines take seconds to import
    from diffusers import DiTPipeline


@dataclass(frozen=True)
class DiT:
    """An ``Objective`` whose texts are the names of its classes, or their numbers."""

    pipeline: "DiTPipeline"
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

    def condition(self, texts: Sequence[str]) -> Batch:
        number_of = {text: number for number, text in enumerate(self.texts)}
        return {"labels": torch.tensor([number_of[text] for text in texts])}

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        labels = conditions["labels"]
        answer = self.denoiser(noisy, timestep=steps, class_labels=labels, return_dict=False)[0]
        return answer[:, : noisy.shape[1]]  # a learned variance is not trained

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng():  # a step of the sampler may draw without the generator
            torch.manual_seed(seed)
            drawn = self.pipeline(
                class_labels=self.condition(texts)["labels"].tolist(),
                generator=generator,
                num_inference_steps=num_inference_steps,
                output_type="pt",
            )
        return (2 * drawn.images.float() - 1).clamp(-1, 1)


def make(pipeline: "DiTPipeline", texts: Sequence[str] = (), image_size: int | None = None) -> DiT:
    """Raise ValueError for a configuration that training or sampling would not follow.

    Labels are no longer dropped at random: that is for guidance, and its chance is not secret.
    """
    config = pipeline.transformer.config
    check_vae(pipeline.vae, config.in_channels, "transformer")
    check_answer(config)
    check_constants(pipeline.vae, ("shift_factor", "latents_mean", "latents_std"))
    side = whole_number("transformer", "sample_size", config.sample_size)
    size = side * latents.size_factor(pipeline.vae)
    check_own_size(size, image_size)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return DiT(pipeline, class_names(pipeline.labels, config.num_embeds_ada_norm), size)


def class_names(labels: dict[str, int], num_classes: int) -> tuple[str, ...]:
    """A name of each class that no other has: the first of its own, or its number.

    labels: number by name, where several names may be of one class.
    """
    names = {}
    for name, number in labels.items():
        names.setdefault(number, name)
    return tuple(names.get(number, str(number)) for number in range(num_classes))


FAMILY = Family(
    pipeline="DiTPipeline",
    make=make,
    components={
        "transformer": ("diffusers.DiTTransformer2DModel",),
        "scheduler": tuple(f"diffusers.{name}" for name in DDPM_SCHEDULERS),
        "vae": ("diffusers.AutoencoderKL",),
    },
    options={"id2label": None},
    target_modules=("to_k", "to_q", "to_v", "to_out.0"),
    follows_prompts=False,
)
