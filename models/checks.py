"""What makes a base unfit: configurations that training or sampling would not follow."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

UNUSED_INPUTS = (
    *("addition_embed_type", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("time_cond_proj_dim", "num_class_embeds"),
)
"""Inputs of a UNet beyond image, timestep and tokens."""


def whole_number(part: str, name: str, value: object) -> int:
    """``value``, one whole number above 0; ValueError that names ``part`` and ``name``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the {part}'s {name} must be one whole number, got {value}")
    return value


def check_own_size(own: int, asked: int | None) -> None:
    """Raise ValueError where another size is asked for than the one that a base draws."""
    if asked not in (None, own):
        raise ValueError(f"it draws images of {own} pixels a side; leave image_size out")


def check_unet(unet: nn.Module, unused: Collection[str]) -> None:
    """Raise ValueError for a UNet that takes more than is given, or answers with other channels."""
    config = unet.config
    for name in unused:
        if config.get(name) is not None:
            raise ValueError(
                f"the unet has {name} = {config[name]!r}, an input that this command does not give"
            )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the unet must give as many channels as it takes, got out_channels "
            f"{config.out_channels} and in_channels {config.in_channels}"
        )


def check_answer(config: Any) -> None:
    """Raise ValueError for an answer of other channels than the latents', once or twice."""
    if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"the transformer must answer with {config.in_channels} channels, as it takes, or with "
            f"as many for a variance as well, got {config.out_channels}"
        )


def check_vae(vae: nn.Module, channels: int, denoiser: str = "unet") -> None:
    """Raise ValueError for an autoencoder whose latents are not those that the denoiser takes."""
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"the vae gives {vae.config.latent_channels} channels and the {denoiser} takes "
            f"{channels}"
        )
    if vae.config.in_channels != vae.config.out_channels:
        raise ValueError("the vae's in_channels and out_channels must be equal")


def check_constants(vae: nn.Module, unread: Sequence[str]) -> None:
    """Raise ValueError for a scale of latents that the pipeline does not undo as it draws."""
    for name in unread:
        if vae.config.get(name) is not None:
            raise ValueError(f"the vae has {name}, which this pipeline does not undo as it draws")


def check_flow_vae(vae: nn.Module) -> None:
    """Raise ValueError for latents that these pipelines do not undo by shift and scale."""
    check_constants(vae, ("latents_mean", "latents_std"))
    if vae.config.shift_factor is None:
        raise ValueError("the vae has no shift_factor, which this pipeline undoes as it draws")
