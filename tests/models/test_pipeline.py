"""Pipelines: what is saved is what is loaded, images and latents alike, and LoRA files fit."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dpengine.models import ClassConditionalPipeline, ClassEmbedding


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_pipeline(vae: AutoencoderKL | None = None) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return ClassConditionalPipeline(unet, DDIMScheduler(), ClassEmbedding(8, ["cat", "dog"]), vae)


def sample(pipeline: ClassConditionalPipeline, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline([0, 1, 1], num_inference_steps=2, generator=generator)


def reload(pipeline: ClassConditionalPipeline, folder) -> ClassConditionalPipeline:
    pipeline.save_pretrained(folder)
    return ClassConditionalPipeline.from_pretrained(folder)


def test_class_embedding_gives_one_token_per_label():
    embedding = ClassEmbedding(8, ["cat", "dog"])
    tokens = embedding(torch.tensor([1, 0, 1]))
    assert tokens.shape == (3, 1, 8)
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("class_names", [[], ["cat", "cat"]])
def test_unusable_class_names_are_refused(class_names):
    with pytest.raises(ValueError, match="class_names"):
        ClassEmbedding(8, class_names)


def test_pixel_pipeline_survives_the_round_trip(tmp_path):
    pipeline = tiny_pipeline()
    loaded = reload(pipeline, tmp_path)
    assert loaded.vae is None
    assert loaded.class_embedding.config.class_names == ["cat", "dog"]
    assert torch.equal(sample(loaded), sample(pipeline))


def test_latent_pipeline_survives_the_round_trip(tmp_path):
    pipeline = tiny_pipeline(tiny_vae())
    loaded = reload(pipeline, tmp_path)
    assert isinstance(loaded.vae, AutoencoderKL)
    assert torch.equal(sample(loaded), sample(pipeline))


def test_folder_holds_only_safetensors_and_json(tmp_path):
    tiny_pipeline(tiny_vae()).save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["class_embedding"] == ["dpengine.models.pipeline", "ClassEmbedding"]


def test_latents_are_divided_by_the_scaling_factor():
    pipeline = tiny_pipeline(tiny_vae())
    seen = []
    pipeline.vae.decode = lambda latents: (
        seen.append(latents) or AutoencoderKL.decode(pipeline.vae, latents)
    )
    sample(pipeline)
    pipeline.vae.register_to_config(scaling_factor=pipeline.vae.config.scaling_factor / 2)
    sample(pipeline)
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_pixels_are_their_own_latents():
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(tiny_pipeline().encode(images), images)


def test_latents_are_the_scaled_mode_of_each_image_alone():
    """Removing images changes no bit of the others' latents."""
    pipeline = tiny_pipeline(tiny_vae())
    images = torch.rand(7, 3, 16, 16) * 2 - 1
    latents = pipeline.encode(images)
    assert latents.shape == (7, 1, 8, 8)
    assert torch.equal(pipeline.encode(images[2:]), latents[2:])
    mode = pipeline.vae.encode(images[:1]).latent_dist.mode()
    assert torch.equal(latents[:1], mode * pipeline.vae.config.scaling_factor)


@pytest.mark.parametrize(("vae", "shape"), [(None, (3, 1, 8, 8)), (tiny_vae(), (3, 3, 16, 16))])
def test_images_are_float32_between_minus_one_and_one(vae, shape):
    images = sample(tiny_pipeline(vae))
    assert images.shape == shape and images.dtype == torch.float32
    assert images.abs().max() <= 1


def test_the_generator_decides_the_images():
    pipeline = tiny_pipeline()
    assert torch.equal(sample(pipeline), sample(pipeline))
    assert not torch.equal(sample(pipeline), sample(pipeline, seed=1))


@pytest.mark.parametrize("labels", [[], [2], [-1], [[0]]])
def test_labels_outside_the_classes_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        tiny_pipeline()(labels)


def test_a_lora_of_the_unet_loads_with_its_alpha(tmp_path):
    pipeline = tiny_pipeline()
    plain = sample(pipeline)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.unet.add_adapter(config)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned = sample(pipeline)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    loaded = tiny_pipeline()
    loaded.load_lora_weights(tmp_path)
    assert not torch.equal(tuned, plain)
    assert torch.equal(sample(loaded), tuned)
