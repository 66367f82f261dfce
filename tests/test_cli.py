"""Bad input to the command: one clear sentence, exit status 2, and nothing half-written."""

import numpy as np
import pytest

from dpengine import finetune


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

    monkeypatch.setattr("dpengine.accounting.prv.Heterogeneous", fail)
    monkeypatch.setattr("dpengine.accounting.pld.upper", lambda *args, **kwargs: None)
    monkeypatch.setattr("dpengine.accounting.rdp.upper", lambda *args: float("inf"))
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
