"""Every family of bases: its loss, its gradients, a run of the command, and its own pipeline."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from dpengine import finetune, generate
from dpengine.models import adapter, family_of, make_path, row_losses, synthetic_rows
from dpengine.models.base import load_base
from dpengine.settings import (
    DataSettings,
    ModelSettings,
    PerformanceSettings,
    PrivacySettings,
    Settings,
)
from dpengine.training.job import complete, prepare
from tests import families

TEXTS, SIZE, RANK, ALPHA = ("a photo of cat", "a photo of dog"), 16, 2, 5.0
PROMPTED = [name for name in families.BASES if name[:3] not in ("dit", "ddp")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a base by its name, written once."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(name: str) -> str:
        if name not in made:
            made[name] = families.save(name, folder / name)
        return made[name]

    return base


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a sub-folder for each class that a base knows, of five colour images."""
    generator = np.random.default_rng(0)

    def images(base: str) -> str:
        folder = tmp_path_factory.mktemp("images")
        for name in ("0", "2") if base == "ddpm-classes" else ("cat", "dog"):
            (folder / name).mkdir()
            for number in range(5):
                pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number}.png")
        return str(folder)

    return images


def settings_of(name: str, base: str, images: str) -> Settings:
    prompt = "a photo of {class}" if name in PROMPTED else None
    return Settings(
        data=DataSettings(images, prompt=prompt, image_size=SIZE),
        model=ModelSettings(base=base, rank=RANK, alpha=ALPHA),
        privacy=PrivacySettings(delta=1e-2, draws_per_record=2, num_steps=2),
        performance=PerformanceSettings(physical_batch_size=8, device="cpu"),
    )


# ---- The loss of diffusers' training scripts, a row at a time


def clip_states(pipeline, number: str, text: str):
    tokenizer = getattr(pipeline, f"tokenizer{number}")
    how = {"padding": "max_length", "max_length": 20, "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(text, **how).input_ids
    return getattr(pipeline, f"text_encoder{number}")(tokens, output_hidden_states=True)


def t5_states(pipeline, number: str, text: str, length: int):
    how = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    tokens = getattr(pipeline, f"tokenizer{number}")(text, **how).input_ids
    return getattr(pipeline, f"text_encoder{number}")(tokens)[0]


def unet_loss(pipeline, x, noise, t, text):
    scheduler = pipeline.scheduler
    if isinstance(scheduler, EDMEulerScheduler):
        return edm_loss(pipeline, x, noise, t, text)
    noisy = scheduler.add_noise(x, noise, t)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x, noise, t)
    states = clip_states(pipeline, "", text)
    if isinstance(pipeline, diffusers.StableDiffusionPipeline):
        answer = pipeline.unet(noisy, t, states[0]).sample
    else:
        answer = xl_answer(pipeline, noisy, t, text)
    return (answer - target).square().mean()


def xl_answer(pipeline, noisy, t, text):
    first, second = (clip_states(pipeline, number, text) for number in ("", "_2"))
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).double()
    added = {"time_ids": sizes, "text_embeds": second[0]}
    return pipeline.unet(noisy, t, tokens, added_cond_kwargs=added).sample


def edm_loss(pipeline, x, noise, t, text):
    """Of the image, weighted by 1 / c_out²; t counts from the clean end."""
    scheduler = pipeline.scheduler
    sigma, data = scheduler.sigmas[1000 - t].double(), scheduler.config.sigma_data
    seen = x + sigma * noise
    scaled, step = scheduler.precondition_inputs(seen, sigma), scheduler.precondition_noise(sigma)
    answer = xl_answer(pipeline, scaled, step, text)
    error = scheduler.precondition_outputs(seen, answer, sigma) - x
    return (error.square() * (sigma**2 + data**2) / (sigma * data) ** 2).mean()


def learned_variance_loss(pipeline, x, noise, t, text):
    """Of PixArt and DiT: the first half of the answer, the noise."""
    noisy = pipeline.scheduler.add_noise(x, noise, t)
    if isinstance(pipeline, diffusers.DiTPipeline):
        labels = torch.tensor(pipeline.get_label_ids([text]))
        answer = pipeline.transformer(noisy, timestep=t, class_labels=labels).sample
    else:
        how = {"padding": "max_length", "max_length": 300, "return_tensors": "pt"}
        tokens = pipeline.tokenizer(text, **how)
        states = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        added = {"resolution": None, "aspect_ratio": None}
        if pipeline.transformer.use_additional_conditions:
            added = {"resolution": torch.tensor([[16.0, 16.0]]).double()}
            added |= {"aspect_ratio": torch.tensor([[1.0]]).double()}
        answer = pipeline.transformer(
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=tokens.attention_mask,
            timestep=t,
            added_cond_kwargs=added,
        ).sample
    assert answer.shape[1] == 2 * x.shape[1]
    return (answer.chunk(2, dim=1)[0] - noise).square().mean()


def pixel_loss(pipeline, x, noise, t, text):
    noisy = pipeline.scheduler.add_noise(x, noise, t)
    labels = torch.tensor([int(text)]) if pipeline.unet.config.num_class_embeds else None
    return (pipeline.unet(noisy, t, class_labels=labels).sample - noise).square().mean()


def loss_of(name: str):
    if name.startswith(("pixart", "dit")):
        return learned_variance_loss
    if name.startswith("ddpm"):
        return pixel_loss
    return flow_loss if name.startswith(("sd3", "flux")) else unet_loss


def flow_loss(pipeline, x, noise, t, text):
    """t counts from the clean end; the scheduler from the noise."""
    sigma = pipeline.scheduler.sigmas[999 - t].double()
    timestep = pipeline.scheduler.timesteps[999 - t].double()
    noisy, target = (1 - sigma) * x + sigma * noise, noise - x
    if isinstance(pipeline, FluxPipeline):
        packed, guidance = pipeline._pack_latents(noisy, 1, 4, 8, 8), torch.tensor([3.5]).double()
        tokens = t5_states(pipeline, "_2", text, 512)
        answer = pipeline.transformer(
            hidden_states=packed,
            timestep=timestep / 1000,
            guidance=guidance if pipeline.transformer.config.guidance_embeds else None,
            pooled_projections=clip_states(pipeline, "", text).pooler_output,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(512, 3).double(),
            img_ids=pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float64),
        ).sample
        return (pipeline._unpack_latents(answer, 16, 16, 2) - target).square().mean()
    first, second = (clip_states(pipeline, number, text) for number in ("", "_2"))
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    width = pipeline.transformer.config.joint_attention_dim
    tokens = torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]))
    third = torch.zeros(1, 256, width).double()
    if pipeline.text_encoder_3 is not None:
        third = t5_states(pipeline, "_3", text, 256)
    answer = pipeline.transformer(
        noisy,
        timestep=timestep,
        encoder_hidden_states=torch.cat([tokens, third], dim=-2),
        pooled_projections=torch.cat([first[0], second[0]], dim=-1),
    ).sample
    return (answer - target).square().mean()


@pytest.mark.parametrize("name", families.BASES)
def test_losses_are_those_of_diffusers_scripts_a_row_at_a_time(bases, name):
    pipeline = load_base(bases(name)).to(torch.float64)
    objective = family_of(pipeline).make(pipeline, TEXTS, SIZE)
    texts = TEXTS if name in PROMPTED else objective.texts[:2]
    texts = texts if len(texts) == 2 else 2 * texts
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 3, *objective.latent_shape, generator=generator).double()
    times, labels = torch.tensor([20, 500, 970]), torch.tensor([0, 1, 1])
    batch = {"latents": x, "diffusion_noise": noise, "times": times}
    batch |= {n: table[labels] for n, table in objective.condition(texts).items()}
    path = make_path(pipeline.scheduler)
    with torch.no_grad():
        losses = row_losses(objective, path, batch)
        rows = zip(x.split(1), noise.split(1), times.split(1), labels, strict=True)
        expected = [loss_of(name)(pipeline, *row, texts[label]) for *row, label in rows]
    # Tables of times are float32, here and there.
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", families.BASES)
def test_latents_are_what_the_pipeline_decodes(bases, name):
    """Encoded and undone as the pipeline does it, an image is what its autoencoder makes of it."""
    pipeline = load_base(bases(name))
    objective = family_of(pipeline).make(pipeline, TEXTS, SIZE)
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = objective.encode(image)
    assert latents.shape[1:] == objective.latent_shape
    if name.startswith("ddpm"):
        assert torch.equal(latents, image)
        return
    config = pipeline.vae.config
    with torch.no_grad():
        mode = pipeline.vae.encode(image).latent_dist.mode()
    back = latents / config.scaling_factor + (config.shift_factor or 0)
    if config.latents_mean is not None:
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        back = latents * std / config.scaling_factor + mean
    torch.testing.assert_close(back, mode, rtol=1e-5, atol=1e-6)


# ---- Adapters


@pytest.fixture(scope="module")
def trained(bases, images):
    """A prepared job whose adapter has other weights than at first, by the name of its base.

    ``prepare`` compares its per-record gradients with those of single records.
    """
    jobs = {}

    def job(name: str):
        if name not in jobs:
            jobs[name] = prepare(settings_of(name, bases(name), images(name)))
            generator = torch.Generator().manual_seed(5)
            for param in jobs[name].capture.parameters:
                param.data += 0.3 * torch.randn(param.shape, generator=generator)
        return jobs[name]

    return job


@pytest.mark.parametrize("name", families.BASES)
def test_a_stock_pipeline_loads_the_adapter_and_answers_as_the_trained_model(
    trained, bases, tmp_path, name
):
    """Every tensor is counted; alpha is not the rank."""
    job = trained(name)
    adapter.save_lora(job.objective.denoiser, tmp_path, adapter.part_of(job.objective.pipeline))
    saved = load_file(tmp_path / adapter.WEIGHTS_FILE)
    factors = [n for n, _ in job.objective.denoiser.named_parameters() if "lora_" in n]
    assert len(saved) == len(factors) >= 16
    left_out = {n: None for n, part in job.objective.pipeline.components.items() if part is None}
    stock = type(job.objective.pipeline).from_pretrained(bases(name), **left_out)
    objective = family_of(stock).make(stock, job.objective.texts, SIZE)
    path = make_path(stock.scheduler)
    rows = synthetic_rows(objective, path, 4)

    @torch.no_grad()
    def answers(model):
        model.denoiser.eval()
        return model.predict(rows["latents"], path.steps[rows["times"]], rows)

    base = answers(objective)
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path)
    else:
        adapter.load_lora(stock, tmp_path)
    loaded = [n for n, _ in objective.denoiser.named_parameters() if "lora_" in n]
    assert len(loaded) == len(saved)
    assert not torch.allclose(answers(objective), base, rtol=1e-2, atol=1e-2)
    with job.capture.suspended():
        expected = answers(job.objective)
    torch.testing.assert_close(answers(objective), expected, rtol=1e-4, atol=1e-5)
    if hasattr(stock, "load_lora_weights"):  # and by a reader that knows nothing of metadata
        stock.unload_lora_weights()
        torch.testing.assert_close(answers(objective), base)
        stock.load_lora_weights(saved)
        torch.testing.assert_close(answers(objective), expected, rtol=1e-4, atol=1e-5)
    # And drawn by the pipeline itself, as a user would.
    if name in PROMPTED:
        how = {"height": SIZE, "width": SIZE, "num_inference_steps": 2}
        if name.startswith("pixart"):
            how["use_resolution_binning"] = False
        assert stock("a photo of cat", **how).images[0].size == (SIZE, SIZE)


@pytest.mark.parametrize("name", families.BASES)
def test_every_default_target_is_trained_and_no_other_layer(trained, name):
    job = trained(name)
    targets = family_of(job.objective.pipeline).target_modules
    assert job.settings.model.target_modules == targets
    assert Settings.from_dict(job.settings.to_dict()) == job.settings == complete(job.settings)
    law = "logit-normal" if name.startswith("sd3") else "uniform"
    assert job.settings.training.time_law == law
    layers = {
        n.split(".lora_")[0] for n, _ in job.objective.denoiser.named_parameters() if ".lora_" in n
    }
    assert all(any(layer.endswith(f".{target}") for target in targets) for layer in layers)
    assert all(any(layer.endswith(f".{target}") for layer in layers) for target in targets)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", families.BASES)
def test_half_precision_recomputation_and_a_budget_of_memory_fit_every_family(
    bases, images, name, precision
):
    """Through all checks of ``prepare``, which compares records in every slot of a batch."""
    settings = settings_of(name, bases(name), images(name))
    performance = PerformanceSettings(
        precision=precision, gradient_checkpointing=True, max_memory="1GB", device="cpu"
    )
    job = prepare(replace(settings, performance=performance))
    frozen = [p for p in job.objective.denoiser.parameters() if not p.requires_grad]
    assert sum(p.dtype != torch.float32 for p in frozen) > len(frozen) / 2


@pytest.mark.parametrize("name", families.BASES)
def test_the_command_trains_releases_and_draws(bases, images, tmp_path, capsys, name):
    command = [
        *("--base", bases(name), "--data", images(name)),
        *(("--prompt", "a photo of {class}") if name in PROMPTED else ()),
        *("--image-size", str(SIZE), "--num-steps", "2", "--delta", "1e-2", "--rank", "2"),
        *("--draws-per-record", "2", "--physical-batch-size", "8", "--num-synthetic", "3"),
        *("--sampler-steps", "2", "--output", str(tmp_path / "run")),
    ]
    assert finetune.main(command) == 0, capsys.readouterr().err
    with np.load(tmp_path / "run" / "synthetic.npz") as synthetic:
        assert synthetic["images"].shape == (3, SIZE, SIZE, 3)
        assert synthetic["images"].std() > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["class_names"] == (["cat", "dog"] if name in PROMPTED else [])
    file = tmp_path / "more.npz"
    assert generate.main(f"--run {tmp_path / 'run'} --num 2 --output {file}".split()) == 0
    with np.load(file) as drawn:
        assert drawn["images"].shape == (2, SIZE, SIZE, 3)
