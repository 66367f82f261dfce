"""The command from end to end, on a few small images: what it writes, refuses and survives."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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

from dpengine import finetune, generate, run_folder
from dpengine.base import load_base
from dpengine.engine import train
from dpengine.ledger import Ledger
from dpengine.models import ClassConditionalPipeline, ClassEmbedding, denoising_losses
from dpengine.run_folder import RunFolder

N, STEPS = 24, 3


@pytest.fixture
def private_npz(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8), np.uint8)
    np.savez(tmp_path / "private.npz", images=images, labels=np.arange(N) % 10)
    return tmp_path / "private.npz"


@pytest.fixture
def arguments(private_npz, tmp_path) -> list[str]:
    """A run of seconds: three steps, two draws, forty images."""
    return (
        f"--data {private_npz} --num-steps {STEPS} --draws-per-record 2 --physical-batch-size 8 "
        f"--num-synthetic 40 --sampler-steps 2 --delta 1e-3 --output {tmp_path / 'run'}"
    ).split()


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


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
    assert next(iter(pipeline.unet.peft_config.values())).lora_alpha == 5
    expected = load_base("default").unet
    state = {key.removeprefix("unet."): value for key, value in saved.items()}
    for name, module in expected.named_modules():
        if f"{name}.lora.down.weight" in state:
            update = state[f"{name}.lora.up.weight"] @ state[f"{name}.lora.down.weight"]
            module.weight.data += 5 / 2 * update
    adapted = pipeline.unet(*inputs).sample
    torch.testing.assert_close(adapted, expected(*inputs).sample, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-4)


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
    return load_file(run.checkpoints / f"step-{step:06d}.safetensors")


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

    monkeypatch.setattr("dpengine.prepare.load_base", load_and_break)
    assert finetune.main(arguments) == 2
    assert "mixes the records" in capsys.readouterr().err
    assert not run.path.exists()


# diffusers' schedulers call NumPy on tensors in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_the_sampler_of_the_base_does_not_touch_training(arguments, run, monkeypatch, scheduler):
    """Some samplers add noise by the steps they were last set to."""
    seen = []

    def load_with_scheduler(base):
        pipeline = load_base(base)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        return pipeline

    def watch(unet, noise_scheduler, *args):
        latents, ones = torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1)
        timesteps = torch.tensor([3, 250, 555, 998])
        seen.append(noise_scheduler.add_noise(latents, ones, timesteps).flatten())
        return denoising_losses(unet, noise_scheduler, *args)

    monkeypatch.setattr("dpengine.prepare.load_base", load_with_scheduler)
    monkeypatch.setattr("dpengine.engine.denoising_losses", watch)
    assert finetune.main(arguments) == 0
    alphas = load_base("default").scheduler.alphas_cumprod[[3, 250, 555, 998]]
    for stddev in seen:
        torch.testing.assert_close(stddev, (1 - alphas).sqrt())


def test_nothing_private_is_printed_or_stored(arguments, run, capsys):
    """Two data sets of one public size print and store the same, but for the noised weights."""
    assert finetune.main([*arguments, "--public-dataset-size", "20"]) == 0
    streams = capsys.readouterr()
    first = streams.out, report_of(run), run.card.read_text(), run.ledger.read_text()
    config = run.config.read_text()
    path = Path(arguments[1])
    np.savez(path, images=np.full((5, 8, 8), 255, np.uint8), labels=np.arange(5))
    arguments[arguments.index("--output") + 1] = str(run.path) + "2"
    assert finetune.main([*arguments, "--public-dataset-size", "20"]) == 0
    second = RunFolder(Path(str(run.path) + "2"))
    streams_of_second = capsys.readouterr()
    # Besides times and rates, the progress bar shows the planned steps and their epsilon.
    shown = [
        re.findall(r"/3 |epsilon <= [0-9.]+", s.err)[-2:] for s in (streams, streams_of_second)
    ]
    assert shown[0] == shown[1] == ["/3 ", shown[0][1]]
    out = streams_of_second.out.replace("run2", "run")
    ledgers = [
        text.replace(digest(r), "")
        for text, r in ((first[3], run), (second.ledger.read_text(), second))
    ]
    assert first[:3] == (out, report_of(second), second.card.read_text())
    assert ledgers[0] == ledgers[1]
    assert config == second.config.read_text().replace("run2", "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "0"], "epsilon must be > 0"),
        (["--epsilon", "-1"], "epsilon must be > 0"),
        (["--epsilon", "nan"], "epsilon must be > 0"),
        (["--delta", "0.05"], "delta must be above 0 and below 1 / dataset size"),
        (["--delta", "0.02", "--public-dataset-size", "100"], "delta must be"),
        (["--sampling-rate", "1.5"], "sampling_rate must be"),
        (["--num-steps", "0"], "num_steps must be"),
        (["--max-grad-norm", "0"], "max_grad_norm must lie"),
        (["--learning-rate", "0"], "learning_rate must be"),
        (["--rank", "0"], "rank must be"),
        (["--base", "/nowhere/base"], "no class-conditional diffusers pipeline"),
        (["--data", "/nowhere/data"], "data must be"),
        (["--target-modules", "to_q", "to_x"], "'to_x' matches no linear layer"),
        (["--sampler-steps", "5000"], "num_inference_steps"),
        (["--max-grad-norm", "1e-50"], "max_grad_norm must lie between"),
        (["--weight-decay", "inf"], "weight_decay must be"),
        (["--seed", "-1"], "seed must lie between"),
        (["--target-modules"], "target_modules must name"),
        (["--output", "/dev/null/run"], "'/dev/null' is a file"),
        (["--resume", "/nowhere/run"], "takes the run's own settings"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, run, capsys, options, message):
    assert finetune.main(arguments + options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not run.path.exists()


def test_an_accountant_without_an_answer_ends_before_the_ledger(
    arguments, run, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise RuntimeError("Discrete mean differs from continuous mean significantly.")

    monkeypatch.setattr("dpengine.accounting.PRVAccountant", fail)
    assert finetune.main(arguments) == 2
    error = capsys.readouterr().err
    assert "epsilon cannot be certified" in error
    assert "choose" in error
    assert not run.path.exists()


def test_private_data_that_cannot_be_read_is_named(arguments, run, tmp_path, capsys):
    (tmp_path / "images" / "3").mkdir(parents=True)
    (tmp_path / "images" / "3" / "broken.png").write_bytes(b"not an image")
    assert finetune.main([*arguments, "--data", str(tmp_path / "images")]) == 2
    assert str(tmp_path / "images" / "3" / "broken.png") in capsys.readouterr().err
    assert not run.path.exists()


def test_a_label_outside_the_classes_ends_before_the_ledger(arguments, run, capsys):
    np.savez(arguments[1], images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 10]))
    assert finetune.main(arguments) == 2
    assert "label outside" in capsys.readouterr().err
    assert not run.path.exists()


def test_weights_that_overflow_end_the_run(arguments, run, capsys):
    assert finetune.main([*arguments, "--learning-rate", "1e38", "--max-grad-norm", "1e5"]) == 2
    assert "no longer finite" in capsys.readouterr().err
    assert not run.report.exists()


def test_a_run_is_made_whole_or_not_at_all(arguments, run, tmp_path, monkeypatch):
    """Stopped while the folder is being made, it leaves nothing behind."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "create", stop)
    assert finetune.main(arguments) == 130
    assert {file.name for file in tmp_path.iterdir()} == {"private.npz", "cache"}


def test_two_runs_cannot_take_one_folder(arguments, run, monkeypatch, capsys):
    choose = run_folder.choose

    def choose_and_lose(settings):
        folder = choose(settings)
        folder.path.mkdir()
        (folder.path / "other.txt").write_text("the other run's")
        return folder

    monkeypatch.setattr(run_folder, "choose", choose_and_lose)
    assert finetune.main(arguments) == 2
    assert "in use" in capsys.readouterr().err
    assert [file.name for file in run.path.iterdir()] == ["other.txt"]


def test_a_missing_target_lists_the_names_that_exist(arguments, capsys):
    finetune.main([*arguments, "--target-modules", "to_out.Linear"])
    error = capsys.readouterr().err
    assert all(name in error for name in ("to_q", "to_k", "to_v", "to_out.0"))


def test_a_folder_in_use_is_refused(arguments, run, capsys):
    run.path.mkdir()
    (run.path / "thesis.txt").write_text("do not lose")
    assert finetune.main(arguments) == 2
    assert "in use" in capsys.readouterr().err
    assert (run.path / "thesis.txt").read_text() == "do not lose"


def test_a_base_that_is_no_model_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    assert finetune.main([*arguments, "--base", str(tmp_path / "base")]) == 2
    assert "no class-conditional diffusers pipeline" in capsys.readouterr().err


def test_an_unknown_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--epsilonn", "3"])
    assert stop.value.code == 2


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for group in ("data", "model", "privacy", "training", "output"):
        assert f"{group} options" in text


def test_the_default_output_is_the_next_free_number(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = arguments.index("--output")
    del arguments[at : at + 2]
    (tmp_path / "runs" / "private-001").mkdir(parents=True)
    assert finetune.main(arguments) == 0
    assert (tmp_path / "runs" / "private-002" / "privacy_report.json").exists()


def test_a_finished_run_cannot_be_resumed(arguments, run, capsys):
    assert finetune.main(arguments) == 0
    ledger = run.ledger.read_bytes()
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "already spent" in capsys.readouterr().err
    assert run.ledger.read_bytes() == ledger


@pytest.fixture
def stop_in_step(monkeypatch):
    """Let the run be asked to stop, as by Ctrl-C, in the middle of step ``number``."""

    def stop(number: int) -> None:
        def interrupted_train(*args, interrupted, **kwargs):
            calls = 0

            def request() -> bool:
                nonlocal calls
                calls += 1
                if calls == 3 * number - 1:  # each step has three physical batches
                    os.kill(os.getpid(), signal.SIGINT)
                return interrupted()

            return train(*args, interrupted=request, **kwargs)

        monkeypatch.setattr("dpengine.engine.train", interrupted_train)

    return stop


def test_ctrl_c_keeps_whole_steps_and_the_charge_and_can_be_resumed(
    arguments, run, capsys, stop_in_step, monkeypatch
):
    with monkeypatch.context():
        stop_in_step(2)
        assert finetune.main(arguments) == 130
        monkeypatch.undo()
    out = capsys.readouterr().out
    assert "1 steps done" in out
    assert f"--resume {run.path}" in out
    assert Ledger.open(run.ledger).reserved == 2
    assert [f.name for f in run.checkpoints.iterdir()] == ["step-000001.safetensors"]
    assert not run.report.exists()

    assert finetune.main(["--resume", str(run.path)]) == 0
    assert Ledger.open(run.ledger).reserved == STEPS
    assert [f.name for f in sorted(run.checkpoints.iterdir())][-1] == "step-000002.safetensors"
    assert report_of(run)["num_steps"] == STEPS


def test_resuming_other_data_is_refused(arguments, run, capsys, stop_in_step, monkeypatch):
    with monkeypatch.context():
        stop_in_step(2)
        finetune.main(arguments)
        monkeypatch.undo()
    np.savez(arguments[1], images=np.zeros((N + 1, 8, 8), np.uint8), labels=np.zeros(N + 1, int))
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "changed since the run began" in capsys.readouterr().err
    assert Ledger.open(run.ledger).reserved == 2


def test_settings_changed_since_the_run_began_are_refused(
    arguments, run, capsys, stop_in_step, monkeypatch
):
    with monkeypatch.context():
        stop_in_step(2)
        finetune.main(arguments)
        monkeypatch.undo()
    run.config.write_text(run.config.read_text().replace('"rank": 4', '"rank": 8'))
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_run_is_resumed_from_any_folder(arguments, run, tmp_path, stop_in_step, monkeypatch):
    arguments[1] = os.path.relpath(arguments[1])
    with monkeypatch.context():
        stop_in_step(2)
        finetune.main(arguments)
        monkeypatch.undo()
    monkeypatch.chdir("/")
    assert finetune.main(["--resume", str(run.path)]) == 0


def test_lost_checkpoints_of_a_spent_run_are_not_passed_over(
    arguments, run, capsys, stop_in_step, monkeypatch
):
    with monkeypatch.context():
        stop_in_step(STEPS)
        finetune.main(arguments)
        monkeypatch.undo()
    shutil.rmtree(run.checkpoints)
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_ledger_rolled_back_is_refused(arguments, run, capsys, stop_in_step, monkeypatch):
    with monkeypatch.context():
        stop_in_step(2)
        finetune.main(arguments)
        monkeypatch.undo()
    run.ledger.write_bytes(run.ledger.read_bytes().splitlines(keepends=True)[0])
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "rolled back" in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dpengine.finetune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_line(run: RunFolder, number: int) -> None:
    """Wait until the ledger holds ``number`` lines: the plan, then a line for each step."""
    for _ in range(1200):
        if run.ledger.exists() and run.ledger.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.05)
    raise TimeoutError("the run did not reach its step in a minute")


def test_kill_9_never_spends_less_than_was_drawn(arguments, run):
    """Killed in the third step: charged for it, resumable, and never beyond the plan."""
    arguments[arguments.index("--num-steps") + 1] = "40"
    process = start(arguments)
    wait_for_line(run, 4)
    process.kill()
    process.communicate()
    charged = Ledger.open(run.ledger).reserved
    updates = max(int(f.stem[-6:]) for f in run.checkpoints.glob("step-*.safetensors"))
    assert 3 <= charged <= 40
    assert charged - 1 <= updates <= charged
    assert finetune.main(["--resume", str(run.path)]) == 0
    assert Ledger.open(run.ledger).reserved == 40
    last = max(int(f.stem[-6:]) for f in run.checkpoints.glob("step-*.safetensors"))
    assert last == 40 - (charged - updates)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(30))
def test_kill_9_at_a_random_moment(arguments, run, moment):
    """Whatever it hits, what the checkpoints hold was charged, and the run ends within its plan."""
    arguments[arguments.index("--num-steps") + 1] = "40"
    process = start(arguments)
    wait_for_line(run, 1)
    time.sleep(3 * np.random.default_rng(moment).random())
    process.kill()
    process.communicate()
    with contextlib.closing(Ledger.open(run.ledger)) as ledger:
        charged = ledger.reserved
    updates = max((int(f.stem[5:]) for f in run.checkpoints.glob("step-*")), default=0)
    assert updates <= charged <= 40
    assert finetune.main(["--resume", str(run.path)]) == (2 if run.report.exists() else 0)
    assert Ledger.open(run.ledger).reserved == 40


def test_a_real_ctrl_c_ends_with_status_130(arguments, run):
    arguments[arguments.index("--num-steps") + 1] = "400"
    process = start(arguments)
    wait_for_line(run, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {run.path}" in output
    assert "Traceback" not in output


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


def test_settings_survive_the_config_file(arguments, run):
    assert finetune.main([*arguments, "--epsilon", "inf"]) == 0
    settings = run_folder.read_settings(run)
    assert settings.privacy.epsilon == float("inf")
    assert settings.model.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
