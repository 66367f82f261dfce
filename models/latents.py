"""Latents of an autoencoder on the scale that a denoiser works on."""

import torch
from torch import Tensor, nn


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """The mode of each image's latents, scaled by the constants of ``vae``.

    float32 [N, C, H, W] in [-1, 1] to [N, c, h, w]. Images are encoded one by one: in a batch,
    rounding would make a latent depend on how many others there are.
    """
    latents = torch.cat([vae.encode(image).latent_dist.mode() for image in images.split(1)])
    shift, scale = _constants(vae, latents)
    return (latents - shift) * scale


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images [N, C, H, W] of latents, about [-1, 1]: what ``encode`` undoes."""
    shift, scale = _constants(vae, latents)
    return vae.decode(latents / scale + shift).sample


def size_factor(vae: nn.Module) -> int:
    """How many pixels of a side one latent covers."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _constants(vae: nn.Module, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is taken off latents, and what they are then multiplied by: `shift_factor` or, for each
    channel, `latents_mean`; `scaling_factor` and, for each channel, over `latents_std`."""
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[name]).to(latents).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return shift + mean, scale / std
    return shift, scale
