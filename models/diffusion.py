"""The training loss of a denoising diffusion model, one value per row."""

from torch import Tensor, nn


def denoising_losses(
    unet: nn.Module,
    scheduler,
    class_embedding: nn.Module,
    latents: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    diffusion_noise: Tensor,
) -> Tensor:
    """Mean squared error of each row's prediction (Ho et al. 2020; v: Salimans and Ho 2022).

    latents, diffusion_noise [B, C, H, W]; labels, timesteps int64 [B] -> [B]. A row's value depends
    on that row alone, and nothing here is random.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = diffusion_noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, diffusion_noise, timesteps)
    else:
        raise ValueError(
            "scheduler.config.prediction_type must be 'epsilon' or 'v_prediction', got "
            f"{prediction_type!r}; use a base model that was trained with one of them"
        )
    noisy = scheduler.add_noise(latents, diffusion_noise, timesteps)
    tokens = class_embedding(labels)
    prediction = unet(noisy, timesteps, encoder_hidden_states=tokens).sample
    return (prediction - target).square().flatten(1).mean(1)
