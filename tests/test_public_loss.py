"""A loss of public rows: once for each noised update, apart from the records, neither clipped."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import BatchMemoryManager, Capture, DPOptimizer, PrivacyEngine, PrivacyError

BOUND, WEIGHT = 0.5, 7.0
PUBLIC = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])


def private(sigma=0.0) -> tuple[nn.Linear, DPOptimizer]:
    module = nn.Linear(3, 2).train()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(module).parameters, lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=BOUND,
        expected_batch_size=4.0,
        loss_reduction="sum",
    )
    return module, optimizer


def public_loss(module):
    return lambda: WEIGHT * (module(PUBLIC) - 1).square().mean()


def test_the_gradient_is_added_to_the_noised_sum_as_it_is():
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    grads = []
    for is_added in (False, True):
        torch.manual_seed(1)
        module, optimizer = private()
        if is_added:
            optimizer.attach_public_loss(public_loss(module))
        (10 * module(x)).square().sum().backward()
        optimizer.pre_step()
        grads.append([param.grad.clone() for param in module.parameters()])
        plain = copy.deepcopy(module)
    public_loss(plain)().backward()
    for without, with_it, param in zip(*grads, plain.parameters(), strict=True):
        torch.testing.assert_close(with_it, without + param.grad, rtol=1e-6, atol=1e-6)
        assert param.grad.norm() > BOUND  # what clipping would have changed


def test_it_runs_once_for_each_update_however_many_records_and_pieces_there_are():
    module = nn.Linear(3, 2).train()
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        sample_rate=0.1,
    )
    calls = []

    def loss():
        calls.append(optimizer.num_steps)
        return public_loss(module)()

    optimizer.attach_public_loss(loss)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as pieces:
        for (x,) in pieces:
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert calls == list(range(10)) and optimizer.num_steps == len(engine.accountant) == 10


def test_the_place_of_torchs_generators_tells_it_nothing_and_is_left_alone():
    drawn, module_and_optimizer = [], private()
    module, optimizer = module_and_optimizer

    def loss():
        drawn.append(torch.rand(4).tolist())
        return public_loss(module)()

    optimizer.attach_public_loss(loss)
    for _ in range(2):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] != drawn[1]


def test_a_public_loss_that_fails_gives_up_the_batch_before_its_noise():
    module, optimizer = private()
    before = [param.detach().clone() for param in module.parameters()]

    def fails():
        module(PUBLIC)
        raise MemoryError

    optimizer.attach_public_loss(fails)
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    with pytest.raises(PrivacyError, match="no whole logical batch"):
        optimizer.add_noise()
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    optimizer.attach_public_loss(public_loss(module))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.num_steps == 1


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda module: 1.0, TypeError, "one number"),
        (lambda module: module(PUBLIC), TypeError, "one number"),
        (lambda module: torch.ones((), requires_grad=True), ValueError, "no trained tensor"),
    ],
)
def test_what_is_no_loss_of_the_module_is_refused(loss, error, message):
    module, optimizer = private()
    optimizer.attach_public_loss(lambda: loss(module))
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(error, match=message):
        optimizer.step()


def test_a_module_of_opacus_would_take_public_rows_for_records():
    layer = nn.Linear(3, 2)
    for param in layer.parameters():
        param.grad_sample = torch.zeros(1, *param.shape)
    optimizer = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=1.0,
    )
    optimizer.attach_public_loss(public_loss(layer))
    with pytest.raises(PrivacyError, match="a module that is captured"):
        optimizer.step()


def test_rows_of_class_images_are_told_where_they_belong():
    """`[instances, class images]` in one batch, as DreamBooth's script has them."""
    module = nn.Linear(3, 2).train()
    module, optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        sample_rate=0.2,
    )
    with pytest.raises(PrivacyError, match=r"n \* K \+ k.*attach_public_loss"):
        for (x,) in loader:
            module(torch.cat([x, torch.ones(len(x), 3)])).square().mean().backward()
            optimizer.step()
