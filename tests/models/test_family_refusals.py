"""Bases and prompts that are not followed: a sentence, status 2, and nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from dpengine import finetune, generate
from dpengine.data import records as data
from dpengine.data.records import Records
from dpengine.models import FAMILIES, family_of, make_path
from dpengine.models.base import load_base, quiet
from dpengine.models.stable_diffusion import StableDiffusion
from dpengine.settings import (
    DataSettings,
    ModelSettings,
    PerformanceSettings,
    PrivacySettings,
    Settings,
)
from dpengine.training.job import prepare
from tests import families

PROMPT = "a photo of {class}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> str:
    return families.save("sd", tmp_path_factory.mktemp("bases") / "sd")


@pytest.fixture
def own(tmp_path) -> Path:
    """A base that a test may spoil."""
    return Path(families.save("sd", tmp_path / "sd"))


@pytest.fixture
def colour_npz(tmp_path) -> str:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "colour.npz", images=images, labels=np.arange(12) % 2)
    return str(tmp_path / "colour.npz")


def edit(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def command(base, npz, tmp_path, *options) -> list[str]:
    return [
        *("--base", str(base), "--data", npz, "--num-steps", "1", "--delta", "1e-2"),
        *("--draws-per-record", "1", "--physical-batch-size", "8", "--num-synthetic", "2"),
        *("--sampler-steps", "2", "--output", str(tmp_path / "run"), *options),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "follows prompts; give one for the images, such as --prompt 'a photo of {class}'"),
        (["--prompt", PROMPT], "has numbers for classes; give class_names"),
        (["--prompt", PROMPT, "--class-names", "cat"], "a label outside the 1 classes"),
        (["--prompt", "a photo", "--class-names", "cat"], "class_names stand for {class}"),
        (["--prompt", PROMPT, "--class-names", "cat", "cat"], "none of them twice"),
        (["--prompt", " "], "prompt must say something"),
        (["--prompt", "two\nlines"], "prompt must say something, in printable characters"),
        (["--prompt", "a", "--image-size", "17"], "image_size must be a multiple of 8, got 17"),
        (
            ["--prompt", "a", "--image-size", "0"],
            "image_size must be a whole number of at least 1, got 0",
        ),
        (["--prompt", "a", "--base", "default"], "follows no prompts, it knows classes"),
        (["--image-size", "12", "--base", "default"], "draws images of 8 pixels a side"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    shared, colour_npz, tmp_path, capsys, options, message
):
    assert finetune.main(command(shared, colour_npz, tmp_path, *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--class-names", "cat", "dog", "--prompt", PROMPT],
        [
            "--time-law",
            "edm",
            "--loss-weights",
            "min-snr",
            "--snr-gamma",
            "4",
            "--prompt",
            "a scan",
        ],
        ["--image-size", "24", "--physical-batch-size", "1", "--prompt", "a scan"],
    ],
)
def test_an_npz_trains_with_a_prompt(shared, colour_npz, tmp_path, capsys, options):
    """With names for its labels, or one prompt for all images, whatever their labels."""
    assert finetune.main(command(shared, colour_npz, tmp_path, *options)) == 0, capsys.readouterr()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'image = pipeline("{options[-1]}").images[0]' in card


def test_sub_folders_are_the_classes_of_a_prompt(shared, tmp_path, capsys):
    """And no file beside them is one."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "beside.png").write_bytes(b"x")
    asked = command(shared, str(folder), tmp_path, "--prompt", PROMPT)
    assert finetune.main(asked) == 2
    assert "must hold one sub-folder for each class; got none" in capsys.readouterr().err
    (folder / "cat").mkdir()
    assert finetune.main(asked) == 2
    assert "named as in ['cat']; got beside.png" in capsys.readouterr().err


def test_a_base_alone_draws_what_is_asked_for(shared, tmp_path, capsys):
    file = tmp_path / "drawn.npz"
    asked = ["--base", shared, "--num", "2", "--sampler-steps", "2", "--output", str(file)]
    assert generate.main([*asked, "--prompt", "a cat", "a dog"]) == 0
    assert np.load(file)["images"].shape == (2, 16, 16, 3)
    file.unlink()
    assert generate.main(asked) == 2
    assert "follows prompts; give --prompt" in capsys.readouterr().err


def test_an_unknown_family_is_told_which_are_known(own, colour_npz, tmp_path, capsys):
    edit(own / "model_index.json", _class_name="KandinskyPipeline")
    assert finetune.main(command(own, colour_npz, tmp_path, "--prompt", "a")) == 2
    error = capsys.readouterr().err
    assert "KandinskyPipeline" in error and all(name in error for name in FAMILIES)
    assert not (tmp_path / "run").exists()


def test_no_class_that_an_index_names_is_imported_unless_it_is_known(own, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((own / "model_index.json").read_text())
    for name in ("unet", "text_encoder", "tokenizer", "safety_checker", "image_encoder"):
        for entry in (["evil", "X"], ["transformers", "AutoModel"], "evil", ["evil", "X", "Y"]):
            edit(own / "model_index.json", **(index | {name: entry}))
            with pytest.raises(ValueError, match="no code of a base is ever run"):
                load_base(str(own))
    (own / "model_index.json").write_text(json.dumps(index | {"other": ["evil", "X"]}))
    with pytest.raises(ValueError, match="has the other"):
        load_base(str(own))
    index.pop("text_encoder")
    (own / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks text_encoder"):
        load_base(str(own))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_may_run_code_are_refused(own, part):
    (file,) = (own / part).glob("*.safetensors")
    torch.save(load_file(file), own / part / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"got pytorch_model\.bin, which may run code"):
        load_base(str(own))


def spoil(part: str, **changed):
    return lambda pipeline: pipeline.components[part].register_to_config(**changed)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd", spoil("unet", class_embed_type="timestep"), "class_embed_type"),
        ("sd", spoil("unet", in_channels=9), "as many channels as it takes"),
        ("sd", spoil("unet", addition_embed_type="text_time"), "addition_embed_type"),
        ("sd", spoil("unet", time_cond_proj_dim=256), "time_cond_proj_dim"),
        ("sd", spoil("vae", shift_factor=0.1), "the vae has shift_factor"),
        ("sd", spoil("vae", latents_mean=[0.0] * 4), "the vae has latents_mean"),
        ("sd", spoil("vae", latent_channels=16), "the vae gives 16 channels"),
        ("sdxl", spoil("unet", addition_embed_type=None), "addition_embed_type must be"),
        ("sdxl", spoil("vae", shift_factor=0.1), "the vae has shift_factor"),
        ("sd3", spoil("vae", shift_factor=None), "the vae has no shift_factor"),
        ("sd3", spoil("transformer", out_channels=8), "must be equal"),
        ("flux", spoil("transformer", in_channels=384), "the vae gives 4 channels"),
        ("pixart-sigma", spoil("transformer", out_channels=5), "answer with 4 channels"),
        ("dit", spoil("vae", latents_std=[1.0] * 4), "the vae has latents_std"),
        ("ddpm", spoil("unet", class_embed_type="identity"), "class_embed_type"),
        ("ddpm", spoil("unet", sample_size=(16, 16)), "sample_size must be one whole number"),
    ],
)
def test_a_configuration_that_is_not_followed_is_refused(name, change, message):
    pipeline = families.BASES[name]()
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        family_of(pipeline).make(pipeline)


def test_schedulers_of_another_law_are_refused_by_the_index(own):
    for scheduler in (FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()):
        scheduler.save_pretrained(own / "scheduler")
        edit(own / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
        with pytest.raises(ValueError, match="may mean another law of noise"):
            load_base(str(own))


def test_the_scale_of_latents_for_each_channel_is_that_of_sdxl():
    """As EDM-trained SDXL has it: taken off, divided by the deviation, scaled."""
    constants = {"latents_mean": [1.0, -2.0, 0.5, 0.0], "latents_std": [2.0, 1.0, 4.0, 0.5]}
    pipeline = families.stable_diffusion_xl(EDMEulerScheduler(), **constants, scaling_factor=0.5)
    objective = family_of(pipeline).make(pipeline, ("a",), 16)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mode = pipeline.vae.encode(image).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in constants.values())
    torch.testing.assert_close(objective.encode(image), (mode - mean) * 0.5 / std)
    assert len(make_path(pipeline.scheduler)) == 1001


# ---- Captions


@pytest.fixture
def captioned(monkeypatch):
    """Six records with captions, one of them longer than the encoder takes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
    captions = ("a cat", "a dog", "a cat", "secret " * 9, "a dog", "a cat")
    records = Records(images, torch.zeros(6, dtype=torch.long), captions=captions)
    monkeypatch.setattr(data, "load", lambda *_: records)
    return captions


@pytest.fixture
def settings(shared, private_npz) -> Settings:
    return Settings(
        data=DataSettings(str(private_npz), prompt="a cat", image_size=16),
        model=ModelSettings(base=shared, target_modules=("to_q",)),
        privacy=PrivacySettings(delta=1e-2, draws_per_record=1),
        performance=PerformanceSettings(physical_batch_size=8, device="cpu"),
    )


def test_a_caption_is_encoded_beside_no_other(settings, captioned, monkeypatch):
    seen, condition = [], StableDiffusion.condition

    def watched(objective, texts):
        seen.append(list(texts))
        return condition(objective, texts)

    monkeypatch.setattr(StableDiffusion, "condition", watched)
    prepare(settings)
    assert all(len(texts) == 1 for texts in seen)
    assert {text for (text,) in seen} == set(captioned)


def test_equal_captions_are_kept_once_and_none_is_shown(settings, captioned, capfd):
    job = prepare(settings)
    printed = capfd.readouterr()
    assert "secret" not in printed.out + printed.err
    records = job.records.reveal()
    assert records.captions is None and len(records.conditions["tokens"]) == 3
    with quiet():
        expected = job.objective.condition(captioned)["tokens"]
    torch.testing.assert_close(records.conditions["tokens"][records.labels], expected)
