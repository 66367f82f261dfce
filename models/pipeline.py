"""Images from class labels, in the folder format of diffusers."""

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn

from . import latents

DEFAULT_BASE = Path(__file__).parent / "weights" / "digits"


class ClassEmbedding(ModelMixin, ConfigMixin):
    """One learned token per class, what a UNet's cross-attention sees in place of a prompt."""

    @register_to_config
    def __init__(self, embedding_dim: int, class_names: list[str]):
        super().__init__()
        if not class_names or len(set(class_names)) != len(class_names):
            raise ValueError(
                f"class_names must hold at least one name and no name twice, got {class_names}; "
                "list each class once, in the order of the labels"
            )
        self.embedding = nn.Embedding(len(class_names), embedding_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels int64 [B] to tokens [B, 1, embedding_dim]."""
        return self.embedding(labels)[:, None]


class ClassConditionalPipeline(StableDiffusionLoraLoaderMixin, DiffusionPipeline):
    """A UNet that denoises under a class token, and a VAE where the UNet works on latents.

    `from_pretrained` and `save_pretrained` read and write a diffusers folder; `load_lora_weights`
    reads a LoRA of the UNet.
    """

    _optional_components = ["vae"]  # noqa: RUF012  diffusers declares it without ClassVar
    model_cpu_offload_seq = "class_embedding->unet->vae"
    # The LoRA loader asks every pipeline for its text encoder.
    text_encoder = None

    def __init__(self, unet, scheduler, class_embedding, vae=None):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, class_embedding=class_embedding, vae=vae
        )

    @classmethod
    def lora_state_dict(cls, *args, **kwargs):
        """The tensors of a LoRA file, without the `.alpha` that ours once held beside metadata."""
        loaded = super().lora_state_dict(*args, **kwargs)
        state, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
        return (state, *rest) if isinstance(loaded, tuple) else state

    @classmethod
    def load_lora_into_text_encoder(cls, *args, **kwargs) -> None:
        """Nothing: there is no text encoder, and the loader would warn of its absence."""

    @property
    def image_channels(self) -> int:
        """Channels of the images: 1 for grey, 3 for colour."""
        model = self.unet if self.vae is None else self.vae
        return model.config.in_channels

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        latent_size = self.unet.config.sample_size
        if self.vae is None:
            return latent_size
        return latent_size * latents.size_factor(self.vae)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """What the UNet works on: the images, or the mode of their latents, scaled by constants.

        Images float32 [N, C, H, W] in [-1, 1] to [N, c, h, w].
        """
        return images if self.vae is None else latents.encode(self.vae, images)

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1], one for each label [B].

        The generator, on the pipeline's device or on the CPU, is the only source of randomness.
        """
        unet, device = self.unet, self.unet.device
        labels = torch.as_tensor(labels, device=device)
        num_classes = len(self.class_embedding.config.class_names)
        in_range = (labels >= 0) & (labels < num_classes)
        if labels.ndim != 1 or len(labels) == 0 or not in_range.all():
            raise ValueError(
                f"labels must be a non-empty vector of values in 0..{num_classes - 1}, got "
                f"{labels.tolist()}; labels are positions in class_embedding.config.class_names"
            )
        tokens = self.class_embedding(labels)
        shape = (len(labels), unet.config.in_channels, *2 * [unet.config.sample_size])
        sample = denoise(
            self.scheduler,
            lambda noisy, step: unet(noisy, step, encoder_hidden_states=tokens).sample,
            torch.empty(shape, device=device, dtype=unet.dtype),
            num_inference_steps,
            generator,
        )
        images = sample if self.vae is None else latents.decode(self.vae, sample)
        return images.float().clamp(-1, 1)


def denoise(
    scheduler: Any,
    answer: Callable[[Tensor, Tensor], Tensor],
    like: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Samples of the shape and type of ``like``, drawn by ``scheduler`` from noise.

    answer: from noisy samples and a step of the scheduler to what the model predicts. The
        generator, on the device of ``like`` or on the CPU, is the only source of randomness.
    """
    source = like.device if generator is None else generator.device
    sample = torch.randn(like.shape, generator=generator, device=source, dtype=like.dtype)
    sample = sample.to(like.device) * scheduler.init_noise_sigma
    scheduler.set_timesteps(num_inference_steps, device=like.device)
    takes_generator = "generator" in signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for step in scheduler.timesteps:
        output = answer(scheduler.scale_model_input(sample, step), step)
        sample = scheduler.step(output, step, sample, **extra).prev_sample
    return sample
