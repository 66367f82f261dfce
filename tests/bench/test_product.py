"""The whole command beside a script: processes are measured as they are, and both compute alike."""

import json
import sys

import pytest
import torch

from bench import opacus_finetune, process, product
from dpengine.training.job import complete

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_time_and_the_memory_are_those_of_the_command(tmp_path):
    code = "import time; held = bytearray(200 * 2**20); time.sleep(0.3); print('not json')"
    found = process.run([sys.executable, "-c", code], tmp_path, {})
    assert 0.3 <= found.seconds < 5
    small = process.run([sys.executable, "-c", ""], tmp_path, {})
    # What this process holds, torch and all, does not count.
    assert small.peak_bytes < 60 * 2**20
    assert 190 * 2**20 < found.peak_bytes - small.peak_bytes < 220 * 2**20


def test_the_command_runs_in_the_folder_with_the_variables(tmp_path):
    code = "import os; open('seen', 'w').write(os.environ['NAMED'])"
    process.run([sys.executable, "-c", code], tmp_path, {"NAMED": "value"})
    assert (tmp_path / "seen").read_text() == "value"


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="the reason"):
        process.run([sys.executable, "-c", "raise SystemExit('the reason')"], tmp_path, {})


def test_a_step_is_the_difference_of_two_lengths():
    """Start-up of 10 s and 2 s a step in the first round, 20 s and 1 s in the second."""
    few, many = [12.0, 21.0], [16.0, 23.0]
    assert product.per_step(few, many, 1, 3) == [2.0, 1.0]
    assert product.besides_steps(few, many, 1, 3) == [10.0, 20.0]


def test_both_sides_are_told_the_same(tmp_path):
    options = product.Job(num_steps=3, num_synthetic=10, seed=2).options(tmp_path)
    expected = ["--num-steps", "3", "--num-synthetic", "10", "--epsilon", "8.0", "--seed", "2"]
    assert options == [*expected, "--output", str(tmp_path)]


def test_the_script_has_the_defaults_of_the_command():
    settings = complete(product.Settings())
    privacy, training = settings.privacy, settings.training
    assert settings.model.rank == settings.model.alpha == opacus_finetune.RANK
    assert list(settings.model.target_modules) == opacus_finetune.TARGETS
    assert (privacy.delta, privacy.max_grad_norm, privacy.draws_per_record) == (
        *(opacus_finetune.DELTA, opacus_finetune.MAX_GRAD_NORM, opacus_finetune.DRAWS),
    )
    assert privacy.sampling_rate == opacus_finetune.SAMPLE_RATE
    assert training.momentum == opacus_finetune.MOMENTUM and training.optimizer == "sgd"
    assert settings.output.sampler_steps == opacus_finetune.SAMPLER_STEPS
    # 5 / C and a linear schedule, as `trainer` makes them.
    assert 5 / privacy.max_grad_norm == opacus_finetune.LEARNING_RATE
    assert training.learning_rate is None and training.lr_schedule == "linear"


def test_the_script_trains_on_the_same_digits():
    ours = product.data.load(product.DIGITS, [str(n) for n in range(10)], 1, 8)
    images, labels = opacus_finetune.private_digits().tensors
    assert torch.equal(images, ours.images) and torch.equal(labels, ours.labels)


def test_claims_are_read_from_what_each_side_wrote(tmp_path):
    report = {"epsilon": {"upper": 7.9}, "noise_multiplier": 3.0}
    (tmp_path / "privacy_report.json").write_text(json.dumps(report))
    (tmp_path / "claim.json").write_text(json.dumps({"epsilon": 7.8, "noise_multiplier": 3.1}))
    assert product.claim(product.OURS, tmp_path) == (7.9, 3.0)
    assert product.claim("opacus rows", tmp_path) == (7.8, 3.1)


def test_both_sum_alike_and_rows_are_clipped_to_less():
    batch = product.fixed_batch(4, n_physical=2)
    found = product.agreement(batch)
    assert found.distance <= found.tolerance < 1e-3
    # Draws of one record point apart, so clipping each by itself leaves less of their mean.
    assert 0.2 < product.signal_of_rows(batch) < 0.95


@pytest.mark.slow
def test_a_sum_that_is_off_is_seen():
    batch = product.fixed_batch(2, n_physical=1)

    def of_other_losses(batch, bound):
        """As a batch of twice the loss has it: all gradients twice as long before they are cut."""
        halved = product.our_sum(batch, bound / 2)
        return {name: 2 * total for name, total in halved.items()}

    found = product.agreement(batch, of_other_losses)
    assert found.distance > found.tolerance

    def off(batch, bound):
        return {name: 1.001 * total for name, total in product.our_sum(batch, bound).items()}

    found = product.agreement(batch, off)
    assert found.distance > found.tolerance
