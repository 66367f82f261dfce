"""Run folders: made whole or not at all, resumed within their plan, whatever stops them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpengine import finetune, verify
from dpengine.run import folder as run_folder
from dpengine.run import ledger, together
from dpengine.run.folder import RunFolder
from dpengine.run.ledger import Ledger
from dpengine.training.loop import steps

N, STEPS = 24, 3


def test_a_run_is_made_whole_or_not_at_all(arguments, run, tmp_path, monkeypatch):
    """Stopped while the folder is being made, it leaves nothing behind."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "create", stop)
    assert finetune.main(arguments) == 130
    assert {file.name for file in tmp_path.iterdir()} == {"private.npz"}


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


def test_a_folder_in_use_is_refused(arguments, run, capsys):
    run.path.mkdir()
    (run.path / "thesis.txt").write_text("do not lose")
    assert finetune.main(arguments) == 2
    assert "in use" in capsys.readouterr().err
    assert (run.path / "thesis.txt").read_text() == "do not lose"


def test_the_default_output_is_the_next_free_number(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = arguments.index("--output")
    del arguments[at : at + 2]
    (tmp_path / "runs" / "private-001").mkdir(parents=True)
    assert finetune.main(arguments) == 0
    assert (tmp_path / "runs" / "private-002" / "privacy_report.json").exists()


def test_the_seal_of_a_finished_run_is_that_of_its_files(arguments, run):
    assert finetune.main(arguments) == 0
    sealed = ledger.read(run.ledger).seal
    names = {file.name for file in run.path.iterdir()}
    assert sealed.keys() == names - {"ledger.jsonl", "checkpoints"}
    for name, digest in sealed.items():
        assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == digest


def test_a_run_that_lost_its_report_is_released_again(arguments, run, monkeypatch):
    """Stopped between seal and report; the same weights are released, and the last seal counts."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpengine.training.release.report.summary", stop)
        assert finetune.main(arguments) == 130
    run.report.unlink()
    first = ledger.read(run.ledger)
    adapter = load_file(run.adapter)
    assert finetune.main(["--resume", str(run.path)]) == 0
    again = load_file(run.adapter)
    assert adapter.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())
    again = ledger.read(run.ledger)
    assert again.reservations == first.reservations and again.head != first.head
    report = hashlib.sha256(run.report.read_bytes()).hexdigest()
    assert again.seal["privacy_report.json"] == report


def test_a_finished_run_cannot_be_resumed(arguments, run, capsys):
    assert finetune.main(arguments) == 0
    before = run.ledger.read_bytes()
    assert finetune.main(["--resume", str(run.path)]) == 2
    assert "already spent" in capsys.readouterr().err
    assert run.ledger.read_bytes() == before


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

            return steps(*args, interrupted=request, **kwargs)

        monkeypatch.setattr("dpengine.training.loop.steps", interrupted_train)

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
    assert {f.stem for f in run.checkpoints.iterdir()} == {"step-000001"}
    assert not run.report.exists()

    assert finetune.main(["--resume", str(run.path)]) == 0
    assert Ledger.open(run.ledger).reserved == STEPS
    assert [f.name for f in sorted(run.checkpoints.iterdir())][-1] == "step-000002.safetensors"
    assert json.loads(run.report.read_text())["num_steps"] == STEPS


def interrupted(arguments, stop_in_step, monkeypatch) -> None:
    with monkeypatch.context():
        stop_in_step(2)
        assert finetune.main(arguments) == 130
        monkeypatch.undo()


def test_what_cannot_change_epsilon_may_change_on_resume(arguments, run, monkeypatch, capsys):
    """Another machine, another precision: the plan, its settings and its seal stay those of it."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpengine.training.state.Trainer.save", stop)  # in the first step
        assert finetune.main([*arguments, "--max-memory", "8GB"]) == 130
    config, plan = run.config.read_bytes(), ledger.read(run.ledger).plan
    seen = []
    prepare = finetune.prepare
    monkeypatch.setattr(finetune, "prepare", lambda s: seen.append(s) or prepare(s))
    options = (
        "--physical-batch-size 3 --device cpu --precision bf16 --per-record-grads bf16 "
        "--gradient-checkpointing --num-synthetic 20 --sampler-steps 3"
    )
    assert finetune.main(["--resume", str(run.path), *options.split()]) == 0
    performance = seen[0].performance
    assert (performance.physical_batch_size, performance.max_memory) == (3, None)
    assert (performance.precision, performance.per_record_grads) == ("bf16", "bf16")
    assert performance.gradient_checkpointing
    assert run.config.read_bytes() == config
    assert ledger.read(run.ledger).plan == plan
    with np.load(run.synthetic) as synthetic:
        assert (len(synthetic["labels"]), synthetic["sampler_steps"]) == (20, 3)
    assert verify.main([str(run.path)]) == 0


def test_a_default_given_beside_resume_is_taken_as_given(arguments, run, stop_in_step, monkeypatch):
    """The way out of a failing compiler is a default: it must not read as left out."""
    interrupted([*arguments, "--precision", "bf16"], stop_in_step, monkeypatch)
    seen = []
    prepare = finetune.prepare
    monkeypatch.setattr(finetune, "prepare", lambda s: seen.append(s) or prepare(s))
    assert finetune.main(["--resume", str(run.path), "--precision", "fp32"]) == 0
    assert seen[0].performance.precision == "fp32"
    assert seen[0].performance.physical_batch_size == 8  # the run's own


@pytest.mark.parametrize(
    "options",
    [
        "--epsilon 9",
        "--delta 1e-4",
        "--num-steps 4",
        "--sampling-rate 0.5",
        "--max-grad-norm 1",
        "--draws-per-record 1",
        "--clipping automatic",
        "--public-dataset-size 24",
        "--rank 2",
        "--target-modules to_q",
        "--learning-rate 1",
        "--seed 1",
        "--optimizer adamw",
        "--output elsewhere",
        "--data digits",
        "--base elsewhere",
    ],
)
def test_what_a_run_rests_on_is_refused_on_resume_by_name(
    arguments, run, monkeypatch, capsys, options
):
    # No run of steps is needed: a new one that ended before its first.
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_trainer", lambda *args: 1 / 0)
        assert finetune.main(arguments) == 2
    before = run.ledger.read_bytes()
    capsys.readouterr()
    command = ["--resume", str(run.path), "--physical-batch-size", "4", *options.split()]
    assert finetune.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"leave out {options.split()[0]}, or" in error
    assert "physical" not in error
    assert run.ledger.read_bytes() == before


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


@pytest.mark.slow  # tests/faults kills forks of one process, many times and sooner
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


def test_a_real_ctrl_c_ends_with_status_130(arguments, run):
    arguments[arguments.index("--num-steps") + 1] = "400"
    process = start(arguments)
    wait_for_line(run, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {run.path}" in output
    assert "Traceback" not in output


def test_settings_survive_the_config_file(arguments, run):
    assert finetune.main([*arguments, "--epsilon", "inf"]) == 0
    settings = run_folder.read_settings(run)
    assert settings.privacy.epsilon == float("inf")
    assert settings.model.target_modules == ("to_q", "to_k", "to_v", "to_out.0")


def made(folder, data):
    """What ``of_same_data`` reads of a run."""
    folder.mkdir()
    (folder / "ledger.jsonl").touch()
    (folder / "config.json").write_text(json.dumps({"data": {"data": data}, "of": "any version"}))
    return folder


def test_runs_on_the_same_data_are_known_by_where_their_paths_lead(tmp_path):
    data, link = tmp_path / "images", tmp_path / "link"
    data.mkdir()
    link.symlink_to(data)
    runs = tmp_path / "runs"
    runs.mkdir()
    first = made(runs / "first", str(data))
    second = made(runs / "second", str(link))
    made(runs / "other", str(tmp_path / "others"))
    (made(runs / "broken", str(data)) / "config.json").write_text("{")
    (runs / "notes.txt").touch()
    assert run_folder.of_same_data(RunFolder(first)) == [first, second]
    assert run_folder.of_same_data(RunFolder(second)) == [first, second]


def test_a_run_that_cannot_be_read_is_told_of_and_not_priced(tmp_path):
    for name in ("first", "second"):
        made(tmp_path / name, "digits")
    assert together.cost_beside(RunFolder(tmp_path / "first")) == {
        "other_runs": ["second"],
        "epsilon": None,
        "delta": None,
        "adjacency": None,
    }
