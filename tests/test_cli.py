"""Bad input to the command: one clear sentence, exit status 2, and nothing half-written."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, VQModel

from dpengine import account, audit, cli, evaluate, finetune, generate, verify
from dpengine.errors import PrivacyError
from dpengine.evaluation.images import draw_images
from dpengine.models import ClassConditionalPipeline, ClassEmbedding
from dpengine.settings import UserPath
from dpengine.training import results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "0"], "epsilon must be > 0"),
        (["--epsilon", "-1"], "epsilon must be > 0"),
        (["--epsilon", "nan"], "epsilon must be > 0"),
        (["--delta", "0.05"], "delta must be above 0 and below 1 / dataset size"),
        (["--delta", "0.02", "--public-dataset-size", "100"], "delta must be"),
        (["--sampling-rate", "1.5"], "sampling_rate must be"),
        (["--adjacency", "add-remove"], "give public_dataset_size"),
        (["--num-steps", "0"], "num_steps must be"),
        (["--max-grad-norm", "0"], "max_grad_norm must lie"),
        (["--learning-rate", "0"], "learning_rate must be"),
        (["--rank", "0"], "rank must be"),
        (["--base", "/nowhere/base"], "no diffusers pipeline"),
        (["--data", "/nowhere/data"], "data must be"),
        (["--target-modules", "to_q", "to_x"], "'to_x' matches no linear layer"),
        (["--sampler-steps", "5000"], "num_inference_steps"),
        (["--max-grad-norm", "1e-50"], "max_grad_norm must lie between"),
        (["--weight-decay", "inf"], "weight_decay must be"),
        (["--seed", "-1"], "seed must lie between"),
        (["--target-modules"], "target_modules must name"),
        (["--output", "/dev/null/run"], "'/dev/null' is a file"),
        (["--sampling-rate", "1e-320"], "sampling_rate must be at least"),
        (["--rank", "100000"], "rank must be at most"),
        (["--alpha", "1e300"], "alpha must be at most"),
        (["--num-synthetic", "1000000000000"], "num_synthetic must be at most"),
        (["--public-dataset-size", str(10**400)], "too large to compute with"),
        (["--draws-per-record", str(10**18)], "out of memory"),
        (["--output", "/proc/run"], "output folder '/proc' takes no file"),
        (["--resume", "/nowhere/run"], "'/nowhere/run' is not the folder of a run"),
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

    monkeypatch.setattr("dpengine.accounting.prv.Heterogeneous", fail)
    monkeypatch.setattr("dpengine.accounting.pld.upper", lambda *args, **kwargs: None)
    monkeypatch.setattr("dpengine.accounting.rdp.upper", lambda *args: float("inf"))
    monkeypatch.setattr("dpengine.accounting.analytic.bounds", lambda *args, **kwargs: None)
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


def test_a_missing_target_lists_the_names_that_exist(arguments, capsys):
    finetune.main([*arguments, "--target-modules", "to_out.Linear"])
    error = capsys.readouterr().err
    assert all(name in error for name in ("to_q", "to_k", "to_v", "to_out.0"))


def test_a_base_that_is_no_model_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    assert finetune.main([*arguments, "--base", str(tmp_path / "base")]) == 2
    assert "no diffusers pipeline" in capsys.readouterr().err


def test_an_autoencoder_of_codes_is_refused_by_name(arguments, run, tiny_unet, tmp_path, capsys):
    vae = VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(4,),
        norm_num_groups=2,
        num_vq_embeddings=8,
    )
    names = [str(digit) for digit in range(10)]
    base = ClassConditionalPipeline(tiny_unet, DDIMScheduler(), ClassEmbedding(8, names), vae)
    base.save_pretrained(tmp_path / "base")
    assert finetune.main([*arguments, "--base", str(tmp_path / "base")]) == 2
    assert "VQModel" in capsys.readouterr().err
    assert not run.path.exists()


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


@dataclass(frozen=True)
class Options:
    """A command of one option."""

    file: UserPath = "file"
    """Any."""


def outcome_of(error: BaseException, capsys) -> tuple[int, str]:
    def fail(settings):
        raise error

    return cli.run("test", Options, fail, []), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "smaller --physical",
        ),
        (MemoryError(), "smaller --physical"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory"), "--max-memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "--max-memory"),
        (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"), "--gradient-checkpointing"),
        (torch._dynamo.exc.Unsupported("a loop"), "--compile eager"),
        (torch._inductor.exc.InvalidCxxCompiler(), "--compile eager"),
        (NotImplementedError("Cannot copy out of meta tensor; no data!"), "missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_the_machine_are_one_sentence_with_a_way_out(capsys, error, advice):
    status, text = outcome_of(error, capsys)
    assert status == 2
    assert text.startswith("error: ") and advice in text and text.count("\n") == 1


def test_a_broken_protocol_keeps_its_words(capsys):
    error = PrivacyError("the step ran out of memory; its batch is discarded")
    assert outcome_of(error, capsys) == (2, f"error: {error}\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), AssertionError(), KeyError("x"), NotImplementedError("x")]
)
def test_our_own_bugs_keep_their_traceback(capsys, error):
    with pytest.raises(type(error)):
        outcome_of(error, capsys)


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (torch.OutOfMemoryError, "--physical-batch-size 4"),
        (torch._inductor.exc.InvalidCxxCompiler, "--compile eager"),
        (TimeoutError, ""),
    ],
)
def test_a_run_that_the_machine_ends_says_how_it_goes_on(
    arguments, run, monkeypatch, capsys, failure, again
):
    def fail(*args):
        raise failure()

    with monkeypatch.context() as patch:
        patch.setattr("dpengine.training.state.Trainer.after_step", fail)
        assert finetune.main(arguments) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: ")
    command = second.partition("Go on with: python -m dpengine.finetune ")[2]
    assert command == f"--resume {run.path} {again}".strip()
    assert finetune.main(command.split()) == 0


def test_no_memory_for_the_images_of_a_spent_run_says_how_it_is_released(
    arguments, run, monkeypatch, capsys
):
    drawn = []

    def fail_at_the_end(*args, **kwargs):
        drawn.append(results.draw_images)
        if len(drawn) > 3:  # three batches of the rehearsal
            raise torch.OutOfMemoryError
        return draw_images(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("dpengine.training.results.draw_images", fail_at_the_end)
        assert finetune.main(arguments) == 2
    command = capsys.readouterr().err.partition("Go on with: python -m dpengine.finetune ")[2]
    assert command.split() == ["--resume", str(run.path), "--num-synthetic", "4"]
    assert finetune.main(command.split()) == 0
    with np.load(run.synthetic) as synthetic:
        assert len(synthetic["labels"]) == 4
    assert verify.main([str(run.path)]) == 0


def test_a_bug_in_a_run_says_how_it_goes_on_as_well(arguments, run, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("dpengine.training.state.Trainer.after_step", fail)
    with pytest.raises(RuntimeError) as error:
        finetune.main(arguments)
    assert f"--resume {run.path}" in error.value.__notes__[0]


HOSTILE = "a\x1b[2J\x1b]0;title\x07\r\x9b1m\u202egnp.\u2028\udce9é"


def test_what_moves_a_terminal_is_printed_as_its_escape(capsys):
    def command(settings):
        print(f"two\nlines of {HOSTILE}")
        print(HOSTILE, file=sys.stderr)
        raise ValueError(f"file {HOSTILE}\nerror: forged")

    assert cli.run("test", Options, command, []) == 2
    out, err = capsys.readouterr()
    assert out.startswith("two\nlines of a\\x1b[2J") and out.count("\n") == 2
    for text in (out, err.splitlines()[-1]):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert text.rstrip().endswith("é") or "\\nerror: forged" in text
    assert err.count("error: ") == 2 and "\nerror: forged" not in err


def test_a_terminal_without_the_letters_does_not_fail_a_command(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.run("test", Options, lambda settings: print("données"), []) == 0
    out.flush()
    assert out.buffer.getvalue() == b"donn\\xe9es\n"


def test_help_prints_on_a_terminal_without_its_letters():
    done = subprocess.run(
        [sys.executable, "-m", "dpengine.verify", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_tilde_is_the_home_folder_wherever_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    for args in (["--file", "~/x"], ["--file=~/x"]):
        assert cli.run("test", Options, lambda settings: seen.append(settings.file), args) == 0
    assert seen == [f"{tmp_path}/x"] * 2
    for name in ("", "~nobody-of-this-name/x"):
        assert cli.run("test", Options, lambda settings: 1 / 0, [f"--file={name}"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (finetune.main, "--data=~/none"),
        (finetune.main, "--base=~/none"),
        (finetune.main, "--resume=~/none"),
        (finetune.main, "--output=~/file/none"),
        (generate.main, "--output=~/none/a.npz --base default"),
        (generate.main, "--output=a.npz --base=~/none"),
        (generate.main, "--output=a.npz --run=~/none"),
        (evaluate.main, "--run=~/none"),
        (audit.main, "--output=~/none/a.json"),
        (account.main, "--runs ~/none"),
        (account.main, "--noise-multiplier 1 --num-steps 1 --plot=~/none/a.png"),
        (verify.main, "~/none"),
    ],
)
def test_every_path_of_every_command_knows_the_tilde(tmp_path, monkeypatch, capsys, main, command):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "options",
    [
        "--delta 0.2 --public-dataset-size 10",
        "--data /nowhere/data",
        "--output /proc/run",
        "--rank 100000",
        "--device cuda",
        "--sampling-rate 1e-320",
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_loaded(
    arguments, monkeypatch, capsys, options
):
    if torch.cuda.is_available() and "cuda" in options:
        return
    monkeypatch.setattr("dpengine.training.job.load_base", lambda base: 1 / 0)
    assert finetune.main([*arguments, *options.split()]) == 2
    error = capsys.readouterr().err
    assert options.split()[0].lstrip("-").replace("-", "_") in error


def test_delta_is_compared_with_the_data_before_they_are_encoded(arguments, monkeypatch, capsys):
    monkeypatch.setattr("dpengine.models.ClassConditionalPipeline.encode", lambda *_: 1 / 0)
    assert finetune.main([*arguments, "--delta", "0.05"]) == 2
    assert "delta must be" in capsys.readouterr().err


def test_an_error_that_a_number_is_too_large_says_so(capsys):
    status, text = outcome_of(OverflowError(34, "Numerical result out of range"), capsys)
    assert status == 2 and "too large to compute with" in text


def test_a_newline_in_the_name_of_a_run_forges_no_line(arguments, run, tmp_path, capsys):
    assert finetune.main(arguments) == 0
    forged = tmp_path / "run\ntogether: epsilon = 0.0001"
    run.path.rename(forged)
    capsys.readouterr()
    assert account.main(["--runs", str(forged)]) == 0
    assert sum(line.startswith("together") for line in capsys.readouterr().out.splitlines()) == 1
