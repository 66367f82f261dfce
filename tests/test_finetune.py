"""The command from end to end, on a few small images: what it writes and releases."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from safetensors.torch import load_file

from dpengine import finetune, generate, verify
from dpengine.accounting import calibrate_noise_multiplier
from dpengine.models import ClassConditionalPipeline, ClassEmbedding, NoisePath
from dpengine.models.base import load_base
from dpengine.run import state_file
from dpengine.run.folder import RunFolder
from dpengine.run.ledger import Ledger

N, STEPS = 24, 3


def report_of(run: RunFolder) -> dict:
    return json.loads(run.report.read_text())


def digest(run: RunFolder) -> str:
    return hashlib.sha256(run.config.read_bytes()).hexdigest()


def test_a_run_writes_everything_it_promises(arguments, run):
    assert finetune.main(arguments) == 0
    assert {file.name for file in run.path.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "privacy_report.json",
        "config.json",
        "ledger.jsonl",
        "samples.png",
        "synthetic.npz",
        "README.md",
        "checkpoints",
    }
    report = report_of(run)
    assert report["epsilon"]["lower"] <= report["epsilon"]["estimate"] <= report["epsilon"]["upper"]
    assert report["epsilon"]["upper"] <= 8
    assert report["adjacency"] == "zero-out"
    assert report["unit"] == "record"
    assert report["public_dataset_size"] == N
    assert 0 < report["noise_tail_delta"] <= report["delta"] / 1000
    for key in (
        "delta",
        "noise_multiplier",
        "sampling_rate",
        "num_steps",
        "max_grad_norm",
        "draws_per_record",
        "trainable_parameters",
        "versions",
    ):
        assert report[key]
    with np.load(run.synthetic) as synthetic:
        assert synthetic["images"].shape == (40, 8, 8)
        assert synthetic["images"].dtype == np.uint8
        assert np.bincount(synthetic["labels"]).tolist() == [4] * 10
    assert Ledger.open(run.ledger).remaining == 0


def test_the_adapter_loads_in_diffusers_with_its_alpha(arguments, run):
    """All tensors are counted, and outputs equal those of the weights that were trained."""
    assert finetune.main([*arguments, "--rank", "2", "--alpha", "5"]) == 0
    saved = load_file(run.path / "pytorch_lora_weights.safetensors")
    pipeline = load_base("default")
    inputs = (torch.randn(4, 1, 8, 8), 500, pipeline.class_embedding(torch.arange(4)))
    base = pipeline.unet(*inputs).sample
    pipeline.load_lora_weights(run.path)
    loaded = {name: p for name, p in pipeline.unet.named_parameters() if "lora" in name}
    assert len(loaded) == len(saved) > 0
    trained = checkpoint_of(run, STEPS)
    weights = [tensor for name, tensor in trained.items() if name.startswith("weight")]
    for weight in weights:
        alike = [(n, tensor) for n, tensor in saved.items() if tensor.shape == weight.shape]
        assert any(torch.equal(weight * (2.5 if "lora_B" in n else 1), t) for n, t in alike)
    expected = load_base("default").unet
    state = {key.removeprefix("unet."): value for key, value in saved.items()}
    for name, module in expected.named_modules():
        if f"{name}.lora_A.weight" in state:
            update = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            module.weight.data += update
    adapted = pipeline.unet(*inputs).sample
    torch.testing.assert_close(adapted, expected(*inputs).sample, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-4)


@pytest.mark.slow
def test_the_true_size_is_nowhere_under_add_remove(arguments, run, capsys):
    """A number of records that no other number in the files could be."""
    number = 10_007
    images = np.zeros((number, 8, 8), np.uint8)
    np.savez(arguments[1], images=images, labels=np.zeros(number, int))
    options = "--public-dataset-size 20 --sampling-rate 0.001 --epsilon 1 --delta 1e-5"
    assert finetune.main([*arguments, *options.split()]) == 0
    streams = capsys.readouterr()
    texts = [streams.out, streams.err]
    texts += [file.read_bytes().decode("latin-1") for file in run.path.rglob("*") if file.is_file()]
    assert not any("10007" in text or "10,007" in text for text in texts)


def test_an_explicit_public_size_gives_add_remove(arguments, run):
    assert finetune.main([*arguments, "--public-dataset-size", "20"]) == 0
    report = report_of(run)
    assert report["adjacency"] == "add-remove"
    assert report["public_dataset_size"] == report["expected_batch_size"] == 20


def test_replace_one_takes_more_noise_and_says_so(arguments, run, capsys):
    assert finetune.main([*arguments, "--adjacency", "replace-one"]) == 0
    report = report_of(run)
    assert (report["adjacency"], report["accountant"]) == ("replace-one", "analytic")
    assert 7.9 < report["epsilon"]["upper"] <= 8
    # Twice the shift under the same budget: twice the noise, as all records are sampled.
    plain = calibrate_noise_multiplier(8.0, 1e-3, 1.0, 3, report["trainable_parameters"])
    assert report["noise_multiplier"] == pytest.approx(2 * plain, rel=2e-3)
    assert "one record is replaced by any other" in run.card.read_text()
    assert "replace-one, one record, accountant analytic" in capsys.readouterr().out


def test_infinite_epsilon_says_that_it_is_not_private(arguments, run, capsys):
    assert finetune.main([*arguments, "--epsilon", "inf"]) == 0
    assert report_of(run)["private"] is False
    assert report_of(run)["epsilon"]["upper"] == "inf"
    assert "not private" in run.card.read_text()
    assert "not private" in capsys.readouterr().out


def test_poisson_sampling_with_empty_batches_runs(arguments, run):
    """At q = 0.01 and 24 records four in five batches are empty."""
    assert finetune.main([*arguments, "--sampling-rate", "0.01", "--num-steps", "6"]) == 0
    assert Ledger.open(run.ledger).reserved == 6


def test_adamw_and_schedules_run(arguments, run):
    options = ["--optimizer", "adamw", "--lr-schedule", "cosine"]
    assert finetune.main(arguments + options) == 0


def checkpoint_of(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return state_file.read(run.checkpoints / f"step-{step:06d}.safetensors")["tensors"]


def test_the_average_is_what_is_released(arguments, run):
    assert finetune.main([*arguments, "--ema-decay", "0.9"]) == 0
    saved = load_file(run.path / "pytorch_lora_weights.safetensors").values()
    last = checkpoint_of(run, STEPS)
    for name, tensor in last.items():
        if name.startswith("average."):
            assert any(torch.equal(tensor, other) for other in saved if other.shape == tensor.shape)
            weight = last[name.replace("average", "weight")]
            assert not any(
                torch.equal(weight, other) for other in saved if other.shape == weight.shape
            )


def test_the_noise_of_the_command_is_that_of_its_plan(arguments, run):
    """Batches are empty at this rate: the weights move by lr σ C / B times standard normals."""
    rate, lr = 1e-4, 3.0
    options = f"--sampling-rate {rate} --learning-rate {lr} --lr-schedule constant --num-steps 2"
    options += " --epsilon 0.1 --delta 1e-6"
    assert finetune.main([*arguments, *options.split(), "--momentum", "0"]) == 0
    first, second = checkpoint_of(run, 1), checkpoint_of(run, 2)
    step = torch.cat([(second[n] - first[n]).flatten() for n in first if n.startswith("weight")])
    report = report_of(run)
    expected_batch_size = rate * N
    scale = lr * report["noise_multiplier"] * report["max_grad_norm"] / expected_batch_size
    n = len(step)
    assert n == report["trainable_parameters"]
    variance = float(step.double().square().mean()) / scale**2
    # A mean of n squared normals has standard deviation √(2/n); 5 of them allowed.
    assert abs(variance - 1) < 5 * (2 / n) ** 0.5 < 0.11


def test_a_base_that_mixes_records_ends_before_the_ledger(arguments, run, monkeypatch, capsys):
    """The mean over the batch is in the forward pass of the base: no adapter can undo it."""

    class Mixes(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    def load_and_break(base):
        pipeline = load_base(base)
        pipeline.unet.conv_norm_out = Mixes()
        return pipeline

    monkeypatch.setattr("dpengine.training.job.load_base", load_and_break)
    assert finetune.main(arguments) == 2
    assert "mixes the records" in capsys.readouterr().err
    assert not run.path.exists()


# diffusers' schedulers call NumPy on tensors in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_the_sampler_of_the_base_does_not_touch_training(arguments, run, monkeypatch, scheduler):
    """Some samplers add noise by the steps they were last set to."""
    seen, add_noise = [], NoisePath.__call__

    def load_with_scheduler(base):
        pipeline = load_base(base)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def watch(path, *args):
        latents, ones = torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1)
        seen.append(add_noise(path, latents, ones, torch.tensor([3, 250, 555, 998]))[0].flatten())
        return add_noise(path, *args)

    monkeypatch.setattr("dpengine.training.job.load_base", load_with_scheduler)
    monkeypatch.setattr(NoisePath, "__call__", watch)
    assert finetune.main(arguments) == 0
    alphas = load_base("default").scheduler.alphas_cumprod[[3, 250, 555, 998]]
    for stddev in seen:
        torch.testing.assert_close(stddev, (1 - alphas).sqrt())


def test_a_base_with_a_vae_trains_on_latents_of_a_folder(tiny_unet, tmp_path, capsys):
    """Colour images of two sub-folders, encoded to latents and decoded again."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=1,
        norm_num_groups=4,
    )
    names = ["cat", "dog"]
    base = ClassConditionalPipeline(tiny_unet, DDIMScheduler(), ClassEmbedding(8, names), vae)
    base.save_pretrained(tmp_path / "base")
    generator = np.random.default_rng(0)
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.jpg")
    command = (
        f"--base {tmp_path / 'base'} --data {tmp_path / 'images'} --num-steps 2 --delta 1e-2 "
        f"--draws-per-record 2 --num-synthetic 4 --sampler-steps 2 --output {tmp_path / 'run'}"
    )
    assert finetune.main(command.split()) == 0, capsys.readouterr().err
    with np.load(tmp_path / "run" / "synthetic.npz") as synthetic:
        assert synthetic["images"].shape == (4, 16, 16, 3)
    file = tmp_path / "more.npz"
    assert generate.main(f"--run {tmp_path / 'run'} --num 3 --output {file}".split()) == 0
    with np.load(file) as drawn:
        assert drawn["images"].shape == (3, 16, 16, 3)


def test_a_second_run_on_the_same_data_says_what_both_cost(arguments, run, tmp_path, capsys):
    assert finetune.main(arguments) == 0
    assert "compose" not in capsys.readouterr().out
    again = [*arguments[:-1], str(tmp_path / "again")]
    assert finetune.main(again) == 0
    told = capsys.readouterr().out
    assert "Runs on this data compose" in told
    (together,) = re.findall(r"together: epsilon = (\S+) by \w+ at delta = 0\.002", told)
    assert float(together) > 8
    report = json.loads((tmp_path / "again" / "privacy_report.json").read_text())
    assert report["together"]["other_runs"] == [run.path.name]
    assert report["together"]["delta"] == 0.002
    assert float(together) - 1e-4 <= report["together"]["epsilon"] <= float(together)
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"with `{run.path.name}`, all together cost ε = {together} at δ = 0.002" in card
    assert str(tmp_path) not in card
    assert verify.main([str(tmp_path / "again")]) == 0
