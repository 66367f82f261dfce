"""What an optimizer's state cost goes with it, through accelerate's `save_state` too."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import Capture, DPOptimizer, PrivacyEngine, PrivacyError

DELTA = 1e-3


def private(engine: PrivacyEngine):
    module = nn.Linear(3, 2).train()
    return engine.make_private(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def train(module, optimizer, loader) -> None:
    for (x,) in loader:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def epsilon(n_steps: int) -> float:
    """What so many steps of one engine cost."""
    engine = PrivacyEngine()
    train(*private(engine))
    while len(engine.accountant) < n_steps:
        train(*private(engine))
    assert len(engine.accountant) == n_steps
    return engine.get_epsilon(DELTA)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_run_resumed_by_accelerate_costs_what_both_cost(tmp_path, safe_serialization):
    first = PrivacyEngine()
    accelerator = Accelerator(cpu=True)
    made = accelerator.prepare(*private(first))
    train(*made)
    accelerator.save_state(tmp_path / "state", safe_serialization=safe_serialization)
    second = PrivacyEngine()
    accelerator = Accelerator(cpu=True)
    made = accelerator.prepare(*private(second))
    accelerator.load_state(tmp_path / "state")
    assert len(second.accountant) == len(first.accountant) == 4
    train(*made)
    assert second.get_epsilon(DELTA) == pytest.approx(epsilon(8), rel=1e-6)
    assert second.get_epsilon(DELTA) > 1.1 * first.get_epsilon(DELTA)


def test_loading_the_own_state_adds_nothing():
    engine = PrivacyEngine()
    module, optimizer, loader = private(engine)
    train(module, optimizer, loader)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert len(engine.accountant) == 4
    assert optimizer.state_dict()["charges"] == state["charges"]


def test_a_state_without_its_charges_is_refused():
    module, optimizer, loader = private(PrivacyEngine())
    train(module, optimizer, loader)
    state = optimizer.state_dict()
    del state["charges"]
    engine = PrivacyEngine()
    other = private(engine)[1]
    with pytest.raises(PrivacyError, match="does not tell what it cost"):
        other.load_state_dict(state)
    assert not other.state and len(engine.accountant) == 0


def test_a_charged_state_is_refused_where_nothing_counts():
    module, optimizer, loader = private(PrivacyEngine())
    train(module, optimizer, loader)
    plain = DPOptimizer(
        torch.optim.AdamW(Capture(nn.Linear(3, 2).train()).parameters),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    for refuses in (plain, plain.original_optimizer):
        with pytest.raises(PrivacyError, match="nothing here counts"):
            refuses.load_state_dict(optimizer.state_dict())
    assert not plain.state
