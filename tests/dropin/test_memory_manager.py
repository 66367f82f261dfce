"""BatchMemoryManager: a logical batch in pieces is the same batch, and no other."""

import math
import warnings

import numpy as np
import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager as TheirManager
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from dpengine import (
    BatchMemoryManager,
    Capture,
    DPDataLoader,
    DPOptimizer,
    PrivacyEngine,
    PrivacyError,
)

N, IN, OUT, BOUND = 11, 4, 3, 4.4

ROUNDING = 1e-5 * N * BOUND
"""Of a sum of N clipped gradients in float32, and of weights that moved by it."""


def new_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 2))


def images(n: int = N) -> torch.Tensor:
    return 2 * torch.randn(n, IN, generator=torch.Generator().manual_seed(2))


def private(
    *, lr=1.0, x=None, engine=None, batch_size=4, rate=1.0, sigma=0.0, bound=BOUND, **changed
):
    module = new_module()
    if changed.get("poisson_sampling") is not False:
        changed["sample_rate"] = rate
    made = (engine or PrivacyEngine()).make_private(
        module=module,
        optimizer=SGD(module.parameters(), lr=lr),
        data_loader=DataLoader(TensorDataset(images() if x is None else x), batch_size=batch_size),
        noise_multiplier=sigma,
        max_grad_norm=bound,
        **changed,
    )
    return made


def losses(module, x) -> torch.Tensor:
    return (module(x) - 1).square().sum(1)


def use(module, optimizer, x, reduction="mean", draws=1):
    """One turn of a user's loop; each record's K rows are turned and scaled copies of it."""
    rows = (x[:, None] * torch.arange(1, draws + 1)[:, None]).flatten(0, 1)
    getattr(losses(module, rows), reduction)().backward()
    done = optimizer.step()
    optimizer.zero_grad()
    return done


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def clipped_sum(records: list[torch.Tensor], bound=BOUND) -> torch.Tensor:
    """Σ_n min(1, C / ‖g_n‖) g_n, each record's gradient the mean over its rows, in float64."""
    module = new_module().double()
    total = torch.zeros_like(weights(module))
    for rows in records:
        grads = torch.autograd.grad(losses(module, rows.double()).mean(), module.parameters())
        grad = torch.cat([g.flatten() for g in grads])
        total += min(1.0, bound / float(grad.norm())) * grad
    return total


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [1, 3, N, 100, None])
def test_pieces_add_up_to_the_clipped_sum_over_the_constant_divisor(physical, reduction, draws):
    module, optimizer, loader = private(loss_reduction=reduction, draws_per_record=draws)
    before, sizes = weights(module), []
    if physical is not None:
        loader = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
        ).__enter__()
    for (x,) in loader:
        sizes.append(len(x))
        use(module, optimizer, x, reduction, draws)

    assert max(sizes) <= (physical or N) and sum(sizes) == N
    expected = clipped_sum([torch.stack([x * k for k in range(1, draws + 1)]) for x in images()])
    # 4 is the batch size that was given, whatever the number that came; the weights are float32.
    divisor = 4 if reduction == "mean" else 1
    moved = before - weights(module)
    assert (moved * divisor - expected).norm() <= ROUNDING


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_noise_is_added_once_in_a_logical_batch(rate):
    module, optimizer, loader = private(rate=rate, sigma=1.0)
    steps, moved, before = [], 0, weights(module)
    optimizer.attach_step_hook(steps.append)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as pieces:
        for _ in range(6):
            for (x,) in pieces:
                assert len(x) <= 2
                use(module, optimizer, x)
                moved += not torch.equal(before, weights(module))
                before = weights(module)

    assert len(steps) == moved == 6 * len(loader)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_record_of_eight_aligned_draws_moves_the_sum_by_the_bound(reduction):
    """The rows of a record point one way, each with a norm far above the bound."""
    draws, x = 8, 50 * torch.ones(N, IN)
    sums = []
    for n in (N, N - 1):
        module, optimizer, loader = private(
            x=x[:n], loss_reduction=reduction, draws_per_record=draws, static_batch=None
        )
        before = weights(module)
        for (rows,) in loader:
            getattr(losses(module, rows.repeat_interleave(draws, 0)), reduction)().backward()
            optimizer.step()
        sums.append((before - weights(module)) * (4 if reduction == "mean" else 1))

    assert 0.99 * BOUND <= float((sums[0] - sums[1]).norm()) <= BOUND + ROUNDING


def test_pieces_of_a_loader_of_ones_own_move_the_weights_as_with_opacus():
    """Bound 1e-3, far below every norm: there Opacus' 1e-6 in the denominator is 1e-6 / norm."""
    data = DataLoader(TensorDataset(images(12)), batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_optimizer, their_loader = opacus.PrivacyEngine().make_private(
            module=(m := new_module()),
            optimizer=SGD(m.parameters(), lr=100.0),
            data_loader=data,
            noise_multiplier=0.0,
            max_grad_norm=1e-3,
            poisson_sampling=False,
        )
        with TheirManager(
            data_loader=their_loader, max_physical_batch_size=4, optimizer=their_optimizer
        ) as pieces:
            their_sizes = []
            for (x,) in pieces:
                their_sizes.append(len(x))
                losses(theirs, x).mean().backward()
                their_optimizer.step()
                their_optimizer.zero_grad()
    module, optimizer, loader = private(
        lr=100.0, x=images(12), batch_size=6, bound=1e-3, poisson_sampling=False
    )
    captured = new_module()
    Capture(captured)
    plain = DPOptimizer(
        SGD(captured.parameters(), lr=100.0),
        noise_multiplier=0.0,
        max_grad_norm=1e-3,
        expected_batch_size=6,
    )
    for model, opt, given in ((module, optimizer, loader), (captured, plain, data)):
        with BatchMemoryManager(
            data_loader=given, max_physical_batch_size=4, optimizer=opt
        ) as pieces:
            sizes = [(len(x), use(model, opt, x))[0] for (x,) in pieces]
        assert sizes == their_sizes == [3, 3, 3, 3]
        assert (weights(model) - weights(theirs)).norm() <= 1e-4
    assert (weights(theirs) - weights(new_module())).norm() > 0.05


def test_people_are_not_cut_and_count_once():
    ids = np.arange(N + 1) // 3
    x = images(N + 1)
    for physical, n_pieces in ((1, 4), (3, 4), (7, 2), (12, 1)):
        module, optimizer, loader = private(x=x, unit_ids=ids, rows_per_unit=3)
        before, sizes = weights(module), []
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
        ) as pieces:
            for (rows,) in pieces:
                sizes.append(len(rows))
                use(module, optimizer, rows)

        assert len(sizes) == n_pieces and sum(sizes) == 12 and max(sizes) <= max(3, physical)
        expected = clipped_sum([x[ids == unit] for unit in range(4)])
        assert ((before - weights(module)) * 4 - expected).norm() <= ROUNDING


def test_length_is_of_public_numbers():
    _, optimizer, loader = private(rate=0.25)
    lengths = {}
    for physical in (1, 3, 4, 100):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
        ) as pieces:
            lengths[physical] = len(pieces)

    assert lengths == {1: 16, 3: 8, 4: 4, 100: 4}  # 4 batches of 4 records are expected


def test_pieces_and_whole_batches_draw_on_one_budget():
    engine = PrivacyEngine()
    _, optimizer, loader = private(engine=engine, rate=0.5, sigma=1.0)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
    ) as pieces:
        next(iter(pieces))
        next(iter(loader))

    assert len(engine.accountant) == 2


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_a_size_that_is_no_number_of_rows_is_refused(size):
    _, optimizer, loader = private()
    with pytest.raises(ValueError, match="max_physical_batch_size must be a whole number"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer)


def test_an_unfinished_logical_batch_is_not_finished_by_the_next_pass():
    module, optimizer, loader = private()
    before = weights(module)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as pieces:
        for (x,) in pieces:
            use(module, optimizer, x)
            break
        for (x,) in pieces:
            use(module, optimizer, x)

    moved = (before - weights(module)) * 4
    assert (moved - clipped_sum([x[None] for x in images()])).norm() <= ROUNDING


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_two_passes_at_once_do_not_share_a_sum(poisson_sampling):
    """Else a record of both would move one sum by twice the bound."""
    module, optimizer, loader = private(batch_size=N, poisson_sampling=poisson_sampling)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=6, optimizer=optimizer
    ) as pieces:
        first = iter(pieces)
        use(module, optimizer, next(first)[0])
        second = iter(pieces)
        use(module, optimizer, next(second)[0])
        before = weights(module)
        with pytest.raises(PrivacyError):
            use(module, optimizer, next(first)[0])
        assert torch.equal(weights(module), before)


def test_a_signal_against_the_loader_is_refused():
    module, optimizer, loader = private()
    optimizer.signal_skip_step(True)
    with pytest.raises(PrivacyError, match="contradicts the sampler"):
        use(module, optimizer, next(iter(loader))[0])


def test_norms_of_the_records_are_of_both_sides_of_the_bound():
    """The sums above tell clipping from none and from normalising only then."""
    norms = [float(clipped_sum([x[None]], math.inf).norm()) for x in images()]
    small = [n for n in norms if n < BOUND]
    assert 0 < len(small) < len(norms), norms


def own_loop(loader, n_workers=0):
    """An optimizer of one's own, told by signals; record n has the gradient e_n."""
    module = nn.Linear(N, 1, bias=False).train()
    Capture(module)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    return module, optimizer


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_given_up_in_a_loop_of_ones_own_shift_nothing(workers):
    """The last piece of one logical batch and the first of the next: their rest stays apart."""
    loader = DataLoader(TensorDataset(torch.eye(N)), batch_size=4, num_workers=workers)
    module, optimizer = own_loop(loader)
    before = module.weight.detach().clone()
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        for number, (rows,) in enumerate(pieces):
            module(rows).sum().backward()
            if number not in (1, 2):
                optimizer.step()
            optimizer.zero_grad()
    entered = torch.arange(N) >= 6  # records 6 and 7 of the second batch, and the third batch
    torch.testing.assert_close(before - module.weight, entered.float()[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_piece_that_is_not_even_begun_in_a_loop_of_ones_own_is_an_error(workers):
    loader = DataLoader(TensorDataset(torch.eye(N)), batch_size=4, num_workers=workers)
    module, optimizer = own_loop(loader)
    with (
        BatchMemoryManager(loader, 2, optimizer) as pieces,
        pytest.raises(PrivacyError, match=r"every batch must be used|was not used"),
    ):
        for number, (rows,) in enumerate(pieces):
            if number != 1:
                module(rows).sum().backward()
                optimizer.step()
                optimizer.zero_grad()


def their_loop(workers=0, batch_size=4):
    """Opacus' own module, and an order of one's own; record n has the gradient e_n."""
    module = opacus.GradSampleModule(nn.Linear(N, 1, bias=False).train())
    optimizer = DPOptimizer(
        SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    data = TensorDataset(torch.eye(N))
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers)
    weight = module._module.weight
    before = weight.detach().clone()

    def use_piece(rows):
        module(rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def entered():
        """How often each record is in the weights."""
        return (before - weight.detach())[0].round().int().tolist()

    return loader, optimizer, use_piece, entered


THEIRS = pytest.mark.filterwarnings("ignore:Full backward hook")


@THEIRS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_piece_without_a_step_is_an_error_where_signals_tell_the_end(workers):
    loader, optimizer, use_piece, entered = their_loop(workers)
    with (
        BatchMemoryManager(loader, 2, optimizer) as pieces,
        pytest.raises(PrivacyError, match="not followed by step"),
    ):
        for number, (rows,) in enumerate(pieces):
            if number != 1:
                use_piece(rows)
    assert entered() == [0] * N


@THEIRS
@pytest.mark.parametrize("physical", [1, 2, 3, 5])
def test_people_are_not_cut_where_signals_tell_the_end(physical):
    _, optimizer, use_piece, _ = their_loop()
    people = np.arange(N) // 2
    loader = DPDataLoader(
        TensorDataset(torch.eye(N)), sample_rate=1.0, unit_ids=people, rows_per_unit=2
    )
    with BatchMemoryManager(loader, physical, optimizer) as pieces:
        for (rows,) in pieces:
            who = people[rows.argmax(1).numpy()]
            assert len(who) <= max(2, physical)
            assert all(np.bincount(who)[who] == 2), "a person's two rows are not in one piece"
            use_piece(rows)


@THEIRS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signalled_pass_begins_a_logical_batch(workers):
    """Else a record of the piece before would be in one sum twice."""
    loader, optimizer, use_piece, entered = their_loop(workers)
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        for (rows,) in pieces:
            use_piece(rows)
            break
        for (rows,) in pieces:
            use_piece(rows)
    assert entered() == [1] * N


@THEIRS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, N])
def test_two_signalled_passes_at_once_are_an_error(workers, batch_size):
    loader, optimizer, use_piece, entered = their_loop(workers, batch_size)
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        first = iter(pieces)
        use_piece(next(first)[0])
        second = iter(pieces)
        use_piece(next(second)[0])
        with pytest.raises(PrivacyError, match="after another had begun"):
            next(first)
    assert entered() == [0] * N


@THEIRS
def test_what_a_manager_left_unfinished_is_not_part_of_the_next_sum():
    loader, optimizer, use_piece, entered = their_loop()
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        use_piece(next(iter(pieces))[0])
    for (rows,) in loader:
        use_piece(rows)
    assert entered() == [1] * N


@THEIRS
def test_pieces_are_taken_from_the_manager_s_loader_alone():
    """One made around its batch sampler would tell the optimizer nothing."""
    loader, optimizer, *_ = their_loop()
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        around = DataLoader(pieces.dataset, batch_sampler=pieces.batch_sampler)
        with pytest.raises(PrivacyError, match="drawn past its loader"):
            list(around)


@pytest.mark.parametrize("make", [their_loop, None], ids=["signals", "capture"])
@THEIRS
def test_a_manager_is_entered_once_at_a_time(make):
    if make is not None:
        loader, optimizer, *_ = make()
    else:
        _, optimizer, loader = private()
    manager = BatchMemoryManager(loader, 2, optimizer)
    for _ in range(2):
        with manager, pytest.raises(ValueError, match="entered already"):
            manager.__enter__()


def test_pieces_of_a_sampling_loader_of_ones_own_make_one_step():
    loader = DPDataLoader(TensorDataset(torch.eye(N)), sample_rate=0.5)
    module, optimizer = own_loop(loader)
    updates = []
    optimizer.attach_step_hook(updates.append)
    with BatchMemoryManager(loader, 2, optimizer) as pieces:
        for (rows,) in pieces:
            module(rows).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(updates) == len(loader) == 2
    rows = torch.eye(N)  # and without the manager any batch is taken
    module(rows).sum().backward()
    optimizer.step()
    assert len(updates) == 3
