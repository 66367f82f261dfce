"""The training loss: a float64 hand computation, and rows that do not see each other."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from dpengine.models import ClassEmbedding, denoising_losses


def networks(prediction_type: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return unet.to(dtype), scheduler, ClassEmbedding(8, ["a", "b", "c"]).to(dtype)


def batch(rows: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, rows, 2, 8, 8, generator=generator, dtype=dtype)
    labels = torch.arange(rows) % 3
    timesteps = torch.tensor([0, 10, 500, 999])[:rows]
    return latents, labels, timesteps, noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_match_a_hand_computation(prediction_type):
    unet, scheduler, class_embedding = networks(prediction_type)
    latents, labels, timesteps, noise = batch()
    got = denoising_losses(unet, scheduler, class_embedding, latents, labels, timesteps, noise)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for row, t in enumerate(timesteps):
        signal = torch.prod(1 - betas[: t + 1]).sqrt()
        spread = (1 - signal**2).sqrt()
        noisy = signal * latents[row] + spread * noise[row]
        token = class_embedding.embedding.weight[labels[row]]
        prediction = unet(noisy[None], t, encoder_hidden_states=token[None, None]).sample[0]
        velocity = signal * noise[row] - spread * latents[row]
        target = noise[row] if prediction_type == "epsilon" else velocity
        expected = (prediction - target).square().sum() / 128
        # The scheduler keeps its tables in float32, the sum of 1000 logarithms among them.
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=0)


def test_a_rows_loss_ignores_the_other_rows():
    unet, scheduler, class_embedding = networks("v_prediction")
    latents, labels, timesteps, noise = batch()
    arguments = unet, scheduler, class_embedding
    before = denoising_losses(*arguments, latents, labels, timesteps, noise)
    latents[1:] *= 100
    noise[1:] -= 7
    after = denoising_losses(*arguments, latents, labels.flip(0).roll(1), timesteps, noise)
    assert labels.flip(0).roll(1)[0] == labels[0]
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)


def test_gradients_of_a_row_ignore_the_other_rows():
    unet, scheduler, class_embedding = networks("v_prediction")
    latents, labels, timesteps, noise = batch()
    latents.requires_grad_()
    losses = denoising_losses(unet, scheduler, class_embedding, latents, labels, timesteps, noise)
    (grad,) = torch.autograd.grad(losses[2], latents)
    assert grad[2].abs().max() > 0
    assert grad[[0, 1, 3]].abs().max() == 0


def test_an_unknown_prediction_type_is_refused():
    unet, scheduler, class_embedding = networks("sample")
    with pytest.raises(ValueError, match="prediction_type"):
        denoising_losses(unet, scheduler, class_embedding, *batch())
