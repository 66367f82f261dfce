"""Loops of accelerate: every batch once, or an error; the weights of a loop by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import BatchMemoryManager, PrivacyEngine, PrivacyError
from dpengine.mechanism.secure_random import SecureRandom

N_RECORDS, BATCH_SIZE, BOUND, RATE = 10, 3, 0.05, 0.1
SIZES = (4, 0, 3, 2)  # of the logical batches of every pass


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test has an accelerate of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def coins(number: int) -> np.ndarray:
    """Which records are in the logical batch of that number."""
    chosen = np.random.default_rng(number).permutation(N_RECORDS)[: SIZES[number % len(SIZES)]]
    return np.isin(np.arange(N_RECORDS), chosen)


@pytest.fixture
def fixed_coins(monkeypatch):
    numbers = iter(range(1000))
    monkeypatch.setattr(SecureRandom, "bernoulli", lambda *_: coins(next(numbers)))


def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(N_RECORDS, 4, generator=torch.Generator().manual_seed(0)))


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).train()


def prepared(workers: int = 0, prefetch: int | None = None, physical: int | None = None, **how):
    """A run without noise that accelerate has prepared; ``updates`` grows with each update."""
    accelerator, model = Accelerator(cpu=True, **how), make_model()
    engine, updates = PrivacyEngine(), []
    model, private, loader = engine.make_private(
        noise_multiplier=0.0,
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        data_loader=DataLoader(
            dataset(), batch_size=BATCH_SIZE, num_workers=workers, prefetch_factor=prefetch
        ),
        max_grad_norm=BOUND,
        sample_rate=1 / len(SIZES),
    )
    private.original_optimizer.register_step_post_hook(lambda *_: updates.append(None))
    if physical is not None:
        loader = BatchMemoryManager(loader, physical, private).__enter__()
    prepared = accelerator.prepare(model, private, loader)
    names = ("accelerator", "engine", "private", "updates", "model", "optimizer", "loader")
    values = (accelerator, engine, private, updates, *prepared)
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def use(run, rows: torch.Tensor) -> None:
    run.accelerator.backward(run.model(rows).square().mean())
    run.optimizer.step()
    run.optimizer.zero_grad()


def by_hand(numbers: range) -> nn.Sequential:
    """DP-SGD without noise in float64, record by record, over the same logical batches."""
    model, (rows,) = make_model().double(), dataset().tensors
    for number in numbers:
        total = [torch.zeros_like(param) for param in model.parameters()]
        for row in rows[torch.from_numpy(coins(number))].double():
            grads = torch.autograd.grad(model(row).square().sum(), list(model.parameters()))
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            for held, grad in zip(total, grads, strict=True):
                held += grad * min(1.0, BOUND / norm)
        for param, held in zip(model.parameters(), total, strict=True):
            param.data -= RATE * held / BATCH_SIZE
    return model


RARE = [pytest.param(1, n, marks=pytest.mark.slow) for n in (1, 3)]
loaders = pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (2, 2), *RARE])
pieces = pytest.mark.parametrize("physical", [None, 2])


@loaders
@pieces
def test_two_epochs_through_accelerate_are_those_of_a_loop_by_hand(
    fixed_coins, workers, prefetch, physical
):
    run = prepared(workers, prefetch, physical)
    for _ in range(2):
        for (rows,) in run.loader:
            use(run, rows)
    expected = by_hand(range(2 * len(SIZES)))
    assert len(run.updates) == len(run.engine.accountant) == 2 * len(SIZES)
    for param, other in zip(run.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other.float(), rtol=1e-5, atol=1e-6)


@loaders
@pieces
@pytest.mark.parametrize("wrong", ["skip 0", "skip 1", "twice 0", "twice 1"])
def test_a_batch_left_out_or_used_twice_ends_the_run(
    fixed_coins, workers, prefetch, physical, wrong
):
    """No sum but those of whole batches before it is ever applied."""
    run, (how, place) = prepared(workers, prefetch, physical), wrong.split()
    with pytest.raises(PrivacyError):
        for number, (rows,) in enumerate(run.loader):
            for _ in range(1 if number != int(place) else {"skip": 0, "twice": 2}[how]):
                use(run, rows)
    per_batch = 2 if physical and int(place) < 2 else 1  # the first batch is of two pieces
    used = int(place) + (how == "twice")
    assert len(run.updates) == used // per_batch


@loaders
@pieces
def test_skip_first_batches_is_refused(fixed_coins, workers, prefetch, physical):
    run = prepared(workers, prefetch, physical)
    with pytest.raises(PrivacyError):
        for (rows,) in skip_first_batches(run.loader, 1):
            use(run, rows)


@loaders
@pieces
@pytest.mark.parametrize("used", [0, 1])
def test_an_epoch_may_be_left_or_peeked_into(fixed_coins, workers, prefetch, physical, used):
    """What was drawn of it stays charged, and no sum of it goes on into the next epoch."""
    run = prepared(workers, prefetch, physical)
    batches = iter(run.loader)
    for _ in range(used):
        use(run, next(batches)[0])
    next(batches)
    before = len(run.updates)
    for (rows,) in run.loader:
        use(run, rows)
    assert len(run.updates) - before == len(SIZES)
    assert len(SIZES) < len(run.engine.accountant) <= 2 * len(SIZES)


def test_gradient_accumulation_of_accelerate_is_refused(fixed_coins):
    """Its optimizer would leave out every other step(), so the first batch has none."""
    run = prepared(gradient_accumulation_steps=2)
    with pytest.raises(PrivacyError, match="forward, backward and step"):
        for (rows,) in run.loader:
            with run.accelerator.accumulate(run.model):
                use(run, rows)
    assert run.updates == []


def test_accelerates_scheduler_would_count_physical_batches(fixed_coins):
    """Their number tells how many records were drawn: hence the step hook of the example."""
    run = prepared(physical=2)
    counted = [torch.optim.lr_scheduler.LambdaLR(run.private, lambda _: 1.0) for _ in range(2)]
    run.private.original_optimizer.register_step_post_hook(lambda *_: counted[0].step())
    theirs = run.accelerator.prepare(counted[1])
    for (rows,) in run.loader:
        use(run, rows)
        theirs.step()
    assert [scheduler.last_epoch for scheduler in counted] == [len(SIZES), 2 + 1 + 2 + 1]


def test_a_grad_scaler_is_refused_with_the_reason(fixed_coins):
    run = prepared()
    optimizer = AcceleratedOptimizer(run.private, scaler=torch.amp.GradScaler("cpu"))
    (rows,) = next(iter(run.loader))
    optimizer.scaler.scale(run.model(rows).square().mean()).backward()
    with pytest.raises(PrivacyError, match="by the overflows of private records"):
        optimizer.step()
    assert run.updates == []


def test_clip_grad_norm_sees_nothing(fixed_coins):
    run = prepared()
    for (rows,) in run.loader:
        run.accelerator.backward(run.model(rows).square().mean())
        assert run.accelerator.clip_grad_norm_(run.model.parameters(), 1e-9) == 0
        run.optimizer.step()
        run.optimizer.zero_grad()
    for param, other in zip(
        run.model.parameters(), by_hand(range(len(SIZES))).parameters(), strict=True
    ):
        torch.testing.assert_close(param, other.float(), rtol=1e-5, atol=1e-6)


def test_a_second_process_that_joins_later_is_refused(fixed_coins, monkeypatch):
    run = prepared()
    (rows,) = next(iter(run.loader))
    run.accelerator.backward(run.model(rows).square().mean())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="world size of 2"):
        run.optimizer.step()
    assert run.updates == []


def test_the_ema_of_diffusers_averages_the_weights_after_each_update(fixed_coins):
    run, decay = prepared(physical=2), 0.5
    params = list(run.model.parameters())
    average = EMAModel(params, decay=decay, min_decay=decay)
    expected = [param.detach().double() for param in params]

    def update(*_):
        average.step(params)
        kept = decay if average.optimization_step > 1 else 0.0  # it begins with the first update
        for held, param in zip(expected, params, strict=True):
            held.mul_(kept).add_(param.detach().double(), alpha=1 - kept)

    run.private.original_optimizer.register_step_post_hook(update)
    for _ in range(2):
        for (rows,) in run.loader:
            use(run, rows)
        average.store(params)
        average.copy_to(params)
        for param, held in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach().double(), held, rtol=1e-6, atol=1e-6)
        average.restore(params)
    assert average.optimization_step == 2 * len(SIZES)


def test_evaluation_that_stops_early_does_not_disturb_training(fixed_coins):
    run = prepared()
    held_out = run.accelerator.prepare(DataLoader(dataset(), batch_size=2))
    for (rows,) in run.loader:
        use(run, rows)
        for (others,) in held_out:
            with torch.no_grad():
                run.model.eval()(others)
            break
        run.model.train()
    assert len(run.updates) == len(SIZES)


def test_an_optimizer_that_accelerate_has_prepared_is_refused():
    """It may scale the loss of a step, or leave the step out."""
    model = torch.nn.Linear(2, 1)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(TypeError, match=r"accelerator\.prepare after make_private"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(dataset(), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
