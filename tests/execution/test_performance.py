"""Performance settings change time and memory; the plan, the claim and the bound stay."""

import dataclasses

import numpy as np
import pytest
import torch

from dpengine import finetune
from dpengine.data import records as data
from dpengine.data.draws import draw_rows
from dpengine.data.records import Records
from dpengine.execution import memory, performance
from dpengine.mechanism.sampling import PhysicalBatch
from dpengine.mechanism.secure_random import SecureRandom
from dpengine.models import Batch
from dpengine.models.base import load_base
from dpengine.run import report
from dpengine.run.folder import RunFolder
from dpengine.settings import (
    DataSettings,
    ModelSettings,
    PerformanceSettings,
    PrivacySettings,
    Settings,
)
from dpengine.training.job import Job, prepare
from dpengine.training.planning import make_plan
from dpengine.training.state import make_trainer

OTHER_VALUES = {
    "physical_batch_size": [1, 2],
    "max_memory": ["20MB"],
    "device": ["cpu"],
    "precision": ["bf16", "fp16"],
    "per_record_grads": ["bf16"],
    "gradient_checkpointing": [True],
    "compile": ["inductor", "cuda-graph"],
}
"""For each field values that are not its default."""

N, DRAWS = 24, 2


@pytest.fixture
def settings(private_npz) -> Settings:
    return Settings(
        data=DataSettings(str(private_npz)),
        model=ModelSettings(target_modules=("to_q", "to_v")),
        privacy=PrivacySettings(draws_per_record=DRAWS, num_steps=3, delta=1e-3),
        performance=PerformanceSettings(physical_batch_size=8),
    )


def with_performance(settings: Settings, **changes) -> Settings:
    return dataclasses.replace(
        settings, performance=dataclasses.replace(settings.performance, **changes)
    )


def claim(settings: Settings) -> tuple:
    """All that is promised: the plan, the report, the sentence for the reviewer."""
    job = prepare(settings)
    plan = make_plan(settings.privacy, job)
    statement = report.privacy_report(plan, job.inert_tensors)
    return plan, statement, report.statement(statement)


def test_every_performance_setting_has_another_value_here():
    """A field that is new must be given one, and so be tried below."""
    defaults = PerformanceSettings()
    assert {field.name for field in dataclasses.fields(defaults)} == set(OTHER_VALUES)
    for name, values in OTHER_VALUES.items():
        assert values and getattr(defaults, name) not in values


def test_no_performance_setting_changes_the_plan_or_the_claim(settings, monkeypatch):
    """No compiler here: that a recorded pass gives the same gradients is another test's."""
    seen = []

    def eager(capture, loss, how):
        seen.append(how)
        return lambda *inputs: loss(*inputs).backward()

    monkeypatch.setattr("dpengine.execution.passes.make_pass", eager)
    expected = claim(settings)
    assert len(dataclasses.fields(expected[0])) >= 12 and expected[0].noise_multiplier > 0
    for name, values in OTHER_VALUES.items():
        for value in values:
            assert claim(with_performance(settings, **{name: value})) == expected, (name, value)
    assert {"inductor", "cuda-graph"} <= set(seen)


def test_the_settings_of_the_guarantee_do_change_it(settings):
    """Or the test above would compare what never differs."""
    plan = claim(settings)[0]
    for change in ({"epsilon": 4.0}, {"num_steps": 4}, {"max_grad_norm": 0.5}):
        privacy = dataclasses.replace(settings.privacy, **change)
        assert claim(dataclasses.replace(settings, privacy=privacy))[0] != plan


# ---- A memory budget


class Guarded(torch.Tensor):
    """Private rows that nothing may touch while ``locked``."""

    locked = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert not cls.locked, f"{func} touched private records"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def guarded(monkeypatch):
    """Locks the records while the batch size is searched; yields the arguments of the searches."""
    load, search, calls = data.load, memory.largest_batch, []

    def guard(*args):
        records = load(*args)
        images, labels = (t.as_subclass(Guarded) for t in (records.images, records.labels))
        return Records(images, labels, records.unit_ids)

    def locked(*args, **kwargs):
        Guarded.locked = True
        try:
            calls.append((args, kwargs, search(*args, **kwargs)))
        finally:
            Guarded.locked = False
        return calls[-1][2]

    monkeypatch.setattr(data, "load", guard)
    monkeypatch.setattr(memory, "largest_batch", locked)
    yield calls
    assert not Guarded.locked


def test_a_budget_sets_the_batch_from_synthetic_rows_alone(settings, guarded):
    """The batch found was measured to fit, the next larger one does not; both counted anew."""
    budget = "6MB"
    job = prepare(with_performance(settings, max_memory=budget))
    (((run, max_bytes, device), kwargs, found),) = guarded
    assert isinstance(job.records.reveal().images, Guarded)
    assert max_bytes == 6_000_000 and device.type == "cpu" and kwargs["at_most"] == N
    assert found < N
    assert job.physical_batch_size == (found if found % 8 == 0 else 1)
    unet = job.objective.denoiser
    resident = sum(t.nbytes for t in (*unet.parameters(), *unet.buffers()))
    run(1)  # whatever a first pass leaves behind
    assert resident + memory.peak_bytes(lambda: run(found), device) <= max_bytes
    larger = found + (1 if found < 8 else 8 - found % 8)
    assert resident + memory.peak_bytes(lambda: run(larger), device) > max_bytes


@pytest.mark.slow
def test_a_larger_budget_never_exceeds_the_public_expected_size(settings, guarded):
    """Ten of a public size at rate 0.5, whatever the true number is; more is never used."""
    privacy = dataclasses.replace(settings.privacy, public_dataset_size=20, sampling_rate=0.5)
    job = prepare(
        with_performance(dataclasses.replace(settings, privacy=privacy), max_memory="1GB")
    )
    assert guarded[0][1]["at_most"] == 10
    assert job.physical_batch_size <= 10


def test_a_budget_below_one_record_is_refused_before_anything_is_spent(settings):
    with pytest.raises(ValueError, match="max_memory must hold the training step of one record"):
        prepare(with_performance(settings, max_memory="100kB"))


@pytest.mark.slow
def test_a_run_under_a_budget_ends(arguments, run):
    assert finetune.main([*arguments, "--max-memory", "6MB"]) == 0
    assert run.report.exists()


# ---- Half precision


def rows_of(job: Job, n_slots: int) -> Batch:
    """Secret draws of the first records, one draw of noise for all jobs that they are given to."""
    batch = PhysicalBatch(np.arange(n_slots)[:, None], n_slots, is_first=True, is_last=True)
    return draw_rows(job.records, batch, DRAWS, job.times, SecureRandom()).reveal()


def clipped(job: Job, settings: Settings, rows, is_record: torch.Tensor, bound: float):
    privacy = dataclasses.replace(settings.privacy, max_grad_norm=bound, epsilon=float("inf"))
    settings = dataclasses.replace(settings, privacy=privacy)
    plan = make_plan(privacy, job)
    optimizer = make_trainer(settings, plan, job.capture.parameters, job.loss_scale).optimizer
    job.backward(rows)
    batch = job.capture.take()
    summed = optimizer.clipping.clip_and_sum(
        batch.grads.whole, is_record, loss_scale=optimizer._undone_scale(batch.n_rows)
    )
    return batch.grads.pack(summed.values)


@pytest.mark.parametrize(("precision", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 4096.0)])
def test_precision_is_of_the_frozen_base_alone_and_the_loss_scale_constant(
    settings, precision, scale
):
    settings = with_performance(settings, precision=precision)
    job = prepare(settings)
    dtype = performance.DTYPES[precision]
    for name, param in job.objective.denoiser.named_parameters():
        trained = "lora" in name and param.requires_grad
        assert param.requires_grad == trained
        assert param.dtype == (torch.float32 if trained else dtype), name
    assert job.loss_scale == scale == performance.loss_scale(settings.performance)
    performance.uncast(job.objective.denoiser, job.frozen)
    base = dict(load_base("default").unet.named_parameters())
    for name, param in job.objective.denoiser.named_parameters():
        assert param.dtype == torch.float32
        if "lora" not in name:
            assert torch.equal(param, base[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize(("precision", "kept"), [("bf16", "bf16"), ("fp16", "fp32")])
def test_in_half_precision_a_record_adds_at_most_the_bound(settings, precision, kept):
    """And without a bound the sum is that of float32, to the type's roundoff: no scale is left.

    Errors of 2⁻⁸ (bf16) and 2⁻¹¹ for each value, of random signs, through a net some tens deep.
    """
    half = with_performance(settings, precision=precision, per_record_grads=kept)
    exact, job = prepare(settings), prepare(half)
    for params in (exact.capture.parameters, job.capture.parameters):
        generator = torch.Generator().manual_seed(1)
        for param in params:
            param.data += 0.1 * torch.randn(param.shape, generator=generator)
    rows = rows_of(exact, 8)
    everyone = torch.ones(8, dtype=torch.bool)
    expected = clipped(exact, settings, rows, everyone, 1e9)
    got = clipped(job, half, rows, everyone, 1e9)
    assert (got - expected).norm() < (0.1 if precision == "bf16" else 0.02) * expected.norm()
    bound = 1e-4
    for n in range(3):
        norm = float(clipped(job, half, rows, torch.arange(8) == n, bound).norm())
        assert bound * (1 - 1e-6) < norm <= bound


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_run_in_half_precision_releases_a_float32_adapter(arguments, run: RunFolder, precision):
    from safetensors.torch import load_file

    options = f"--precision {precision} --per-record-grads bf16 --gradient-checkpointing"
    options += " --num-synthetic 2 --target-modules to_q"
    assert finetune.main([*arguments, *options.split()]) == 0
    saved = load_file(run.path / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(arguments, run, capsys):
    assert finetune.main([*arguments, "--device", "cuda"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "device must be 'cpu' or 'auto' here, got 'cuda': torch finds no GPU" in error
    assert "Traceback" not in error and not run.path.exists()
