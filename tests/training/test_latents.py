"""What a run trains on: each image by itself, scaled by constants of the base model."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from dpengine.models import ClassConditionalPipeline, ClassEmbedding
from dpengine.settings import DataSettings, ModelSettings, Settings
from dpengine.training.job import prepare


def make_base(folder, unet, vae):
    embedding = ClassEmbedding(8, ["cat", "dog"])
    ClassConditionalPipeline(unet, DDPMScheduler(), embedding, vae).save_pretrained(folder)


def tiny_vae():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=1,
            norm_num_groups=4,
            sample_size=16,
        )


def latents(tmp_path, images):
    """What ``prepare`` hands to training, of ``images`` as data."""
    file = tmp_path / "private.npz"
    np.savez(file, images=images, labels=np.zeros(len(images), int))
    settings = Settings(
        data=DataSettings(str(file)),
        model=ModelSettings(base=str(tmp_path / "base"), rank=1, target_modules=("to_v",)),
    )
    return prepare(settings).records.reveal().images


@pytest.mark.parametrize("on_latents", [False, True], ids=["pixels", "latents"])
def test_a_records_latents_depend_on_no_other_record(tmp_path, tiny_unet, on_latents):
    """Neighbours of another mean, spread and number change no bit of them.

    Divided by the standard deviation of all, say, one record would change every gradient.
    """
    make_base(tmp_path / "base", tiny_unet, tiny_vae() if on_latents else None)
    shape = (16, 16, 3) if on_latents else (8, 8)
    kept, wild = np.random.default_rng(0).integers(0, 256, (2, 3, *shape), np.uint8)
    alone = latents(tmp_path, kept)
    assert alone.std() > 0
    for others in (wild, 0 * wild, np.concatenate([wild, wild // 9])):
        assert torch.equal(latents(tmp_path, np.concatenate([kept, others]))[:3], alone)


def test_pixels_are_scaled_to_the_unit_range_and_no_further(tmp_path, tiny_unet):
    make_base(tmp_path / "base", tiny_unet, None)
    dull = np.random.default_rng(0).integers(100, 110, (3, 8, 8), np.uint8)
    expected = torch.from_numpy(dull[:, None]).float() / 127.5 - 1
    assert torch.equal(latents(tmp_path, dull), expected)


def test_latents_are_scaled_by_the_base_models_constant(tmp_path, tiny_unet):
    vae = tiny_vae()
    make_base(tmp_path / "base", tiny_unet, vae)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.eval().encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents(tmp_path, images), expected, rtol=1e-5, atol=1e-6)
