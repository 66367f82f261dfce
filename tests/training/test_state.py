"""The trainer: what the plan says is what the optimizer does, and a resumed run is the same run."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dpengine import Capture
from dpengine.errors import PrivacyError
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.models import adapter
from dpengine.run.ledger import Ledger
from dpengine.settings import Settings, TrainingSettings
from dpengine.training.state import Trainer, make_trainer

STEPS = 6

PLAN = PrivacyPlan(
    sampling_rate=0.5,
    noise_multiplier=0.0,
    num_steps=STEPS,
    max_grad_norm=0.25,
    delta=1e-3,
    public_dataset_size=20,
    adjacency="zero-out",
    draws_per_record=1,
    trainable_parameters=22,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 5)

    def forward(self, x):
        return self.to_q(x)

    def add_adapter(self, config, adapter_name):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def start(settings: TrainingSettings, plan: PrivacyPlan = PLAN) -> tuple[Model, Trainer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model()
        adapter.add_lora(model, rank=2, alpha=2.0, target_modules=("to_q",), seed=0)
    model.train()
    return model, make_trainer(Settings(training=settings), plan, Capture(model).parameters)


def steps(model: Model, trainer: Trainer, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.after_step()


def test_the_optimizer_has_the_numbers_of_the_plan():
    plan = replace(PLAN, noise_multiplier=3.5)
    optimizer = start(TrainingSettings(), plan)[1].optimizer
    assert optimizer.noise_multiplier == 3.5
    assert optimizer.max_grad_norm == 0.25
    assert optimizer.expected_batch_size == 10.0


def test_the_default_step_size_fits_the_bound():
    assert start(TrainingSettings())[1].optimizer.param_groups[0]["lr"] == 5 / 0.25
    adamw = start(TrainingSettings(optimizer="adamw"))[1]
    assert adamw.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, optimizer, lr_schedule):
    """Without noise; momentum, both moments, learning rate and average all go on."""
    settings = TrainingSettings(
        optimizer=optimizer, lr_schedule=lr_schedule, momentum=0.9, ema_decay=0.8, learning_rate=0.1
    )
    model, whole = start(settings)
    steps(model, whole, 0, STEPS)

    ledger = Ledger.create(tmp_path / "ledger.jsonl", PLAN)
    for _ in range(3):
        ledger.reserve()
    model, stopped = start(settings)
    steps(model, stopped, 0, 3)
    stopped.save(tmp_path / "checkpoints", ledger)
    model, resumed = start(settings)
    resumed.restore(tmp_path / "checkpoints", ledger)
    steps(model, resumed, 3, STEPS)

    pairs = [*zip(whole.params, resumed.params, strict=True)]
    pairs += [*zip(whole.average.tensors, resumed.average.tensors, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]
    assert resumed.average.num_updates == STEPS


def ledger_of(path, plan, reserved):
    ledger = Ledger.create(path, plan)
    for _ in range(reserved):
        ledger.reserve()
    return ledger


def test_a_ledger_without_the_line_of_the_checkpoint_is_refused(tmp_path):
    """Of three charged steps two were done; a ledger of two lines was rolled back all the same."""
    model, trainer = start(TrainingSettings())
    steps(model, trainer, 0, 2)
    own = ledger_of(tmp_path / "ledger", PLAN, 3)
    trainer.save(tmp_path / "checkpoints", own)
    others = {
        "of another past": ledger_of(tmp_path / "past", PLAN, 4),
        "rolled back": ledger_of(tmp_path / "earlier", PLAN, 2),
        "of another run": ledger_of(tmp_path / "other", replace(PLAN, delta=PLAN.delta / 2), 4),
    }
    for ledger in others.values():
        with pytest.raises(PrivacyError, match="rolled back or is another run's"):
            start(TrainingSettings())[1].restore(tmp_path / "checkpoints", ledger)
    resumed = start(TrainingSettings())[1]
    own.reserve()
    resumed.restore(tmp_path / "checkpoints", own)
    assert resumed.average.num_updates == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """Also where its tensors would broadcast."""
    ledger = ledger_of(tmp_path / "ledger", PLAN, 1)
    _, trainer = start(TrainingSettings())
    trainer.save(tmp_path / "checkpoints", ledger)
    _, other = start(TrainingSettings())
    rows = nn.Parameter(torch.zeros(5, *other.params[0].shape[1:]))
    other.params[0] = rows
    before = rows.detach().clone()
    with pytest.raises(ValueError, match="another model"):
        other.restore(tmp_path / "checkpoints", ledger)
    assert torch.equal(rows, before)


def test_weights_that_are_not_finite_are_not_averaged():
    _, trainer = start(TrainingSettings())
    with torch.no_grad():
        trainer.params[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="no longer finite"):
        trainer.after_step()
