"""Bases: known ones load, others are refused with the cause, and no code of theirs is run."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from dpengine.models import ClassConditionalPipeline, ClassEmbedding
from dpengine.models.base import load_base

DOCS = Path(__file__).parent.parent.parent / "docs" / "bases.md"


@pytest.fixture
def save_base(tiny_unet, tmp_path):
    def save(scheduler=None, names=("a", "b"), vae=None, unet=None):
        parts = unet or tiny_unet, scheduler or DDPMScheduler(), ClassEmbedding(8, list(names))
        ClassConditionalPipeline(*parts, vae).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def edit(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(beta_schedule="sigmoid"),
        EulerDiscreteScheduler(prediction_type="v_prediction"),
        EulerDiscreteScheduler(rescale_betas_zero_snr=True),
        DPMSolverMultistepScheduler(use_karras_sigmas=True),
        DDPMScheduler(trained_betas=[0.1, 0.2, 0.3]),
    ],
    ids=["sigmoid", "euler", "zero snr", "karras", "trained betas"],
)
def test_samplers_of_ddpms_law_of_noise_are_taken(save_base, scheduler):
    assert load_base(str(save_base(scheduler))).image_size == 8


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        EDMEulerScheduler(),
        CMStochasticIterativeScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        DDPMScheduler(prediction_type="other"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_laws_of_noise_are_refused(save_base, scheduler):
    with pytest.raises(ValueError, match="scheduler"):
        load_base(str(save_base(scheduler)))


def test_no_module_that_a_folder_names_is_imported(save_base, tmp_path, monkeypatch):
    base = save_base()
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass UNet: pass\n")
    (base / "evil.py").write_text("raise SystemExit('ran')\nclass UNet: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for entry in (["evil", "UNet"], ["diffusers", "evil"], ["os", "system"], "evil", None):
        edit(base / "model_index.json", unet=entry)
        with pytest.raises(ValueError, match="no code of a base is ever run"):
            load_base(str(base))
    edit(base / "model_index.json", unet=["diffusers", "UNet2DConditionModel"], more=["evil", "X"])
    with pytest.raises(ValueError, match="has the more"):
        load_base(str(base))


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("unet", {"sample_size": None}, "sample_size must be one whole number"),
        ("unet", {"sample_size": [8, 8]}, "sample_size must be one whole number"),
        ("class_embedding", {"class_names": [0, 1]}, "class_names .* must be texts"),
        ("scheduler", {"prediction_type": "other"}, "prediction_type"),
    ],
)
def test_a_configuration_that_is_not_followed_is_refused(save_base, part, changed, message):
    base = save_base()
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(base / part / name, **changed)
    with pytest.raises(ValueError, match=message):
        load_base(str(base))


def vae(**config):
    config = {"in_channels": 3, "out_channels": 3} | config
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **config,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_channels": 4}, "the vae gives 4 channels and the unet takes 1"),
        ({"latent_channels": 1, "out_channels": 1}, "in_channels and out_channels"),
    ],
)
def test_a_vae_whose_latents_are_not_followed_is_refused(save_base, config, message):
    with pytest.raises(ValueError, match=message):
        load_base(str(save_base(vae=vae(**config))))


def test_weights_that_cannot_be_read_are_named(save_base):
    file = save_base() / "unet" / "diffusion_pytorch_model.safetensors"
    base, content = str(file.parent.parent), file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")
    with pytest.raises(ValueError, match=r"unet/.*safetensors is a pointer of Git LFS"):
        load_base(base)
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"cannot|can be loaded"):
        load_base(base)
    file.unlink()
    with pytest.raises(ValueError, match=r"must hold weights as \.safetensors, got no weights"):
        load_base(base)
    file.with_suffix(".bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"got diffusion_pytorch_model\.bin, which may run code"):
        load_base(base)
    file.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="weights of a variant only"):
        load_base(base)


def test_weights_that_are_not_finite_are_named(save_base):
    base = save_base()
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"tensor conv_in\.weight has values that are not finite"):
        load_base(str(base))


def test_another_pipeline_is_told_what_can_be_done_with_it(save_base):
    base = save_base()
    edit(base / "model_index.json", _class_name="KandinskyPipeline")
    with pytest.raises(
        ValueError,
        match=r"KandinskyPipeline.*ClassConditionalPipeline.*loop of your own.*bases\.md",
    ):
        load_base(str(base))


def test_the_document_makes_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    with torch.random.fork_rng():
        exec(compile(code, "bases.md", "exec"), {})
    assert load_base("my-base").class_embedding.config.class_names == ["cat", "dog"]
