"""PrivacyEngine: budgets kept, and misuse of what it returns refused."""

import copy
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, TensorDataset

from dpengine import BatchMemoryManager, DPOptimizer, PrivacyEngine, PrivacyError

N, DELTA = 40, 1e-3


def new_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def images(n: int = N) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1)) + 1


def arguments(module=None, *, optimizer=None, batch_size=10, inner=SGD, **order) -> dict:
    module = new_module() if module is None else module
    return {
        "module": module,
        "optimizer": optimizer or inner(module.parameters(), lr=0.1),
        "data_loader": DataLoader(TensorDataset(images()), batch_size=batch_size, **order),
        "max_grad_norm": 1.0,
    }


def private(engine=None, *, sigma=1.0, module=None, **changed):
    how = arguments(module) | {"noise_multiplier": sigma} | changed
    return (engine or PrivacyEngine()).make_private(**how)


def backward(module, x) -> None:
    module(x).square().sum(1).mean().backward()


def use(module, optimizer, x) -> None:
    backward(module, x)
    optimizer.step()
    optimizer.zero_grad()


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().clone().flatten() for p in module.parameters()])


TARGET, EPOCHS = 2.0, 2


@pytest.fixture
def calibrated(tmp_path_factory, monkeypatch):
    """Searches of this file share what they found, and certify it again."""
    cache = tmp_path_factory.getbasetemp() / "caches" / "budgets"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def budgeted(engine, **changed):
    return engine.make_private_with_epsilon(
        **(arguments() | changed), target_epsilon=TARGET, target_delta=DELTA, epochs=EPOCHS
    )


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"sample_rate": 0.25, "static_batch": 4},
        {"poisson_sampling": False},
        {"unit_ids": np.arange(N), "rows_per_unit": 2},
    ],
)
def test_the_planned_epochs_spend_the_target_and_no_more(changed, calibrated):
    engine = PrivacyEngine()
    module, optimizer, loader = budgeted(engine, **changed)
    for _ in range(EPOCHS):
        for (x,) in loader:
            use(module, optimizer, x)

    rate, n_charged = loader.sample_rate or 1.0, len(engine.accountant)
    assert n_charged == EPOCHS / rate
    assert engine.accountant.history == [(optimizer.noise_multiplier, rate, n_charged)]
    spent = engine.accountant.get_epsilon(DELTA)
    assert 0.97 * TARGET <= spent <= TARGET
    before = weights(module)
    for _ in range(2):
        with pytest.raises(PrivacyError, match="planned draws are charged"):
            for (x,) in loader:
                use(module, optimizer, x)
    assert torch.equal(weights(module), before)
    assert engine.accountant.get_epsilon(DELTA) == spent


def test_a_peek_is_paid_by_the_last_pass(calibrated):
    engine = PrivacyEngine()
    module, optimizer, loader = budgeted(engine)
    next(iter(loader))
    lengths = []
    for _ in range(EPOCHS):
        lengths.append(0)
        for (x,) in loader:
            use(module, optimizer, x)
            lengths[-1] += 1

    assert lengths == [4, 3] and len(engine.accountant) == 8


@pytest.mark.parametrize("physical", [None, 3])
def test_a_planned_number_of_steps_is_spent_by_as_many_noisy_updates(physical, calibrated):
    """However many physical batches a loop sees; a pass in which the plan ends is cut short."""
    engine, num_steps = PrivacyEngine(), 6
    module, optimizer, loader = engine.make_private_with_epsilon(
        **arguments(), target_epsilon=TARGET, target_delta=DELTA, num_steps=num_steps
    )
    updates = []
    optimizer.original_optimizer.register_step_post_hook(lambda *_: updates.append(1))
    seen = 0
    with ExitStack() as memory:
        if physical is not None:
            loader = memory.enter_context(BatchMemoryManager(loader, physical, optimizer))
        for _ in range(2):  # of four steps each, had more been planned
            for (x,) in loader:
                assert optimizer.num_steps == len(updates)
                use(module, optimizer, x)
                seen += 1
        assert optimizer.num_steps == len(updates) == len(engine.accountant) == num_steps
        assert seen == num_steps or physical is not None
        with pytest.raises(PrivacyError, match="all 6 planned draws are charged"):
            next(iter(loader))
    assert 0.97 * TARGET <= engine.get_epsilon(DELTA) <= TARGET
    assert copy.deepcopy(optimizer).num_steps == num_steps


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("physical", [None, 3])
def test_an_evaluation_on_the_private_loader_is_refused_before_it_is_charged(
    without_gradients, physical
):
    engine = PrivacyEngine()
    module, optimizer, loader = private(engine)
    with ExitStack() as context:
        if physical is not None:
            loader = context.enter_context(BatchMemoryManager(loader, physical, optimizer))
        with (
            without_gradients(),
            pytest.raises(PrivacyError, match="nothing was charged: to evaluate or to compute lat"),
        ):
            next(iter(loader))
        assert len(engine.accountant) == 0
        use(module.train(), optimizer, next(iter(loader))[0])


def test_an_evaluation_in_eval_mode_is_told_where_to_take_its_batches_from():
    module, _, loader = private()
    with pytest.raises(PrivacyError, match="to evaluate or to cache latents take a DataLoader of"):
        for (x,) in loader:
            module.eval()(x)


def test_latents_are_not_cached_from_the_private_loader():
    module, _, loader = private()
    with pytest.raises(PrivacyError, match="cache latents take a DataLoader of your own"):
        list(loader)
    module, _, loader = private(static_batch=4)
    next(iter(loader))
    with pytest.raises(PrivacyError, match="latents that are computed once belong in the dataset"):
        backward(module, images(5))


@pytest.mark.parametrize("noise_multiplier", [1e-3, 0.1, 0.2])
def test_noise_for_which_no_epsilon_could_be_told_is_refused_at_the_start(noise_multiplier):
    with pytest.raises(ValueError, match="noise_multiplier must be large enough for an epsilon"):
        private(sigma=noise_multiplier)
    engine = PrivacyEngine()
    module, optimizer, loader = private(engine, sigma=0.3)
    for (x,) in loader:
        use(module, optimizer, x)
    assert math.isfinite(engine.get_epsilon(1e-5))


def test_budgets_of_one_engine_are_composed(calibrated):
    engine = PrivacyEngine()
    for _ in range(2):
        loader = budgeted(engine)[2]
        for _ in range(8):
            next(iter(loader))

    assert 1.1 * TARGET < engine.get_epsilon(DELTA) <= 2 * TARGET


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target_delta": 0.0}, "delta must be above 0"),
        ({"target_delta": 1 / N}, "delta must be above 0 and below 1 / dataset size"),
        ({"target_epsilon": 0.0}, "target_epsilon must be"),
        ({"target_epsilon": math.nan}, "target_epsilon must be"),
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"epochs": None}, "give epochs, passes over the loader, or num_steps"),
        ({"num_steps": 3}, "num_steps, noisy updates: one of them"),
        ({"epochs": None, "num_steps": 0}, "num_steps must be a whole number"),
        ({"epochs": None, "num_steps": 3, "poisson_sampling": False}, "by the pass: give epochs"),
    ],
)
def test_a_budget_that_is_none_is_refused(changed, words):
    how = arguments() | {"target_epsilon": 1.0, "target_delta": DELTA, "epochs": 1}
    with pytest.raises(ValueError, match=words):
        PrivacyEngine().make_private_with_epsilon(**(how | changed))


def test_delta_is_compared_with_the_public_size_and_not_with_the_true_one():
    how = arguments() | {"target_epsilon": 1.0, "epochs": 1}
    made = PrivacyEngine().make_private_with_epsilon(**how, target_delta=0.09, sample_rate=1.0)
    assert made[1].expected_batch_size == 10  # the public size is 10, the true one 40


def test_no_target_is_no_noise_and_no_privacy():
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private_with_epsilon(
        **arguments(), target_epsilon=math.inf, target_delta=DELTA, epochs=1
    )
    use(module, optimizer, next(iter(loader))[0])
    assert optimizer.noise_multiplier == 0 and engine.get_epsilon(DELTA) == math.inf


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_what_is_returned(mode):
    how, loss = arguments(), nn.MSELoss()
    engine = PrivacyEngine()
    module, optimizer, *criterion, loader = engine.make_private(
        **how, noise_multiplier=1.0, grad_sample_mode=mode, criterion=loss
    )

    assert module is how["module"] and criterion == ([loss] if mode == "ghost" else [])
    assert optimizer.original_optimizer is how["optimizer"]
    assert loader.dataset is how["data_loader"].dataset
    assert (optimizer.expected_batch_size, loader.sample_rate) == (10, 0.25)


def test_the_capture_comes_in_place_of_the_module_and_gives_it_back():
    module = new_module()
    capture, optimizer, loader = private(module=module, wrap_model=False)
    use(module, optimizer, next(iter(loader))[0])
    capture.cleanup()
    module(images()).sum().backward()

    assert capture.module is module
    assert all(p.grad is not None for p in module.parameters())
    assert not any("forward" in vars(child) for child in module.modules())


def moved(module, optimizer):
    module.to("meta")


def retyped(module, optimizer):
    module.double()


def added(module, optimizer):
    module.append(nn.Linear(2, 2))


def added_to_the_optimizer(module, optimizer):
    module[0].extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [module[0].extra]})


def thawed(module, optimizer):
    module[2].bias.requires_grad_(True)


def frozen(module, optimizer):
    module[0].weight.requires_grad_(False)


def other_noise(module, optimizer):
    optimizer.noise_multiplier = 0.1


def step_twice(module, optimizer):
    optimizer.step()


def noise_without_a_batch(module, optimizer):
    optimizer.add_noise()


def batch_of_ones_own(module, optimizer):
    module(images(8))


def replaced_tensor(module, optimizer):
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def replaced_module(module, optimizer):
    module[2] = nn.Linear(4, 2)


MISUSES = [moved, retyped, added, added_to_the_optimizer, thawed, frozen, replaced_tensor]
MISUSES += [other_noise, step_twice, noise_without_a_batch, batch_of_ones_own, replaced_module]


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_between_two_batches_is_an_error_and_not_a_step(misuse):
    module = new_module()
    module[2].bias.requires_grad_(False)
    inner = SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module, optimizer, loader = private(module=module, optimizer=inner)
    iterator = iter(loader)
    use(module, optimizer, next(iterator)[0])
    params = list(module.parameters())
    before = [p.detach().clone() for p in params]
    # Between cpu and meta torch makes new tensors, and its own error comes before ours.
    errors = (RuntimeError,) if misuse is moved else (PrivacyError, TypeError, ValueError)
    with pytest.raises(errors):
        misuse(module, optimizer)
        use(module, optimizer, next(iterator)[0].to(params[0].dtype))
    assert all(torch.equal(p.to(old), old) for p, old in zip(params, before, strict=True))


def test_backward_twice_is_refused():
    module, _, loader = private()
    loss = module(next(iter(loader))[0]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="backward ran twice"):
        loss.backward()


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_loader_that_was_given_is_not_the_one_to_train_on(shuffle):
    how = arguments(shuffle=shuffle)
    module, _, loader = PrivacyEngine().make_private(**how, noise_multiplier=1.0)
    for after_ours in (False, True):
        with pytest.raises(PrivacyError, match="did not announce"):
            backward(module, next(iter(how["data_loader"]))[0])
        if after_ours:
            break
        use(module, _, next(iter(loader))[0])


def test_batches_of_another_engine_are_refused():
    module, _, _ = private()
    other = private(PrivacyEngine())[2]
    with pytest.raises(PrivacyError, match="did not announce"):
        backward(module, next(iter(other))[0])


def test_batches_beside_the_announced_one_are_refused():
    module, _, loader = private(static_batch=4)
    assert len(next(iter(loader))[0]) == 4
    with pytest.raises(PrivacyError, match="another size"):
        backward(module, images(5))


def test_a_batch_that_is_skipped_is_refused_until_it_is_given_up():
    module, optimizer, loader = private()
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(PrivacyError, match="was not used"):
        next(iterator)
    with pytest.raises(PrivacyError, match="was not used"):
        backward(module, images())
    optimizer.discard()
    use(module, optimizer, next(iter(loader))[0])


def test_a_batch_of_a_pass_that_was_left_is_refused():
    module, optimizer, loader = private()
    x = next(iter(loader))[0]
    second = iter(loader)
    with pytest.raises(PrivacyError, match="did not announce"):
        use(module, optimizer, x)
    use(module, optimizer, next(second)[0])


def test_a_module_made_private_again_knows_the_new_optimizer_alone():
    engine = PrivacyEngine()
    module, old, old_loader = private(engine)
    use(module, old, next(iter(old_loader))[0])
    module, new, loader = private(engine, module=module, optimizer=old, sigma=3.0)
    before = weights(module)

    with pytest.raises(PrivacyError, match="was not; train on the loader"):
        backward(module, next(iter(loader))[0])
        old.step()
    new.discard()
    with pytest.raises(PrivacyError, match="did not announce"):
        backward(module, next(iter(old_loader))[0])
    assert torch.equal(weights(module), before)
    use(module, new, next(iter(loader))[0])
    assert not torch.equal(weights(module), before)
    assert new.original_optimizer is old.original_optimizer
    assert sorted(engine.accountant.history) == [(1.0, 0.25, 2), (3.0, 0.25, 2)]


def test_a_copy_of_model_and_optimizer_takes_no_batch():
    module, optimizer, loader = private()
    twin, twin_optimizer = copy.deepcopy((module, optimizer))
    x = next(iter(loader))[0]
    twin(x).sum().backward()  # a copy is an ordinary module
    before = weights(twin)
    with pytest.raises((PrivacyError, ValueError)):
        twin_optimizer.step()
    assert torch.equal(weights(twin), before)


@pytest.mark.parametrize("charged_only", [False, True])
def test_an_optimizer_of_ones_own_takes_no_batch_that_was_charged_otherwise(charged_only):
    module, _, loader = private(sigma=1.0)
    own = DPOptimizer(
        SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        expected_batch_size=10,
        charged_only=charged_only,
    )
    backward(module, next(iter(loader))[0])
    with pytest.raises(PrivacyError, match="charged with the noise multiplier"):
        own.step()


def test_several_processes_are_refused():
    how = arguments()
    torch.distributed.init_process_group(backend="fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match="world size of 2"):
            PrivacyEngine().make_private(**how, noise_multiplier=1.0)
        assert not any("forward" in vars(child) for child in how["module"].modules())
    finally:
        torch.distributed.destroy_process_group()
    module, optimizer, loader = PrivacyEngine().make_private(**how, noise_multiplier=1.0)
    backward(module, next(iter(loader))[0])
    torch.distributed.init_process_group(backend="fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match="world size of 2"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_a_launch_for_several_processes_that_started_one_is_told(monkeypatch):
    """What `accelerate launch --num_processes 2 --cpu` leaves in the environment."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"asked for several; it started one.*--num_processes 1"):
        private()
    monkeypatch.setenv("WORLD_SIZE", "1")
    private()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("MASTER_ADDR")
    private()


def test_compatible_is_what_can_be_made_private():
    good = new_module()
    for module, is_good in (
        (good, True),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), False),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), False),
    ):
        assert PrivacyEngine().is_compatible(module=module) == is_good
        if is_good:
            assert PrivacyEngine.get_compatible_module(module) is module
            continue
        for call in (PrivacyEngine().validate, PrivacyEngine.get_compatible_module):
            with pytest.raises(ValueError, match="module '1'"):
                call(module=module)
        with pytest.raises(ValueError, match="module '1'"):
            private(module=module)
