"""The draws of a physical batch: layout, strata, padding, secrecy, and what a unit contributes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dpengine import (
    Capture,
    DPOptimizer,
    adapter,
    secure_integers,
    secure_normal,
    secure_normal_like,
)
from dpengine.data import Records
from dpengine.draws import draw_rows
from dpengine.private import Private
from dpengine.sampling import PhysicalBatch
from dpengine.secure_random import SecureRandom

K, STEPS = 4, 1000
FALSE_ALARM = 1e-7
UNITS = ((1, 3, 1), (5, 5, 5))
"""Two units with M = 3: one of two records that takes turns, one of a single record."""


def records(n: int = 6) -> Private[Records]:
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, 2, 2)
    return Private(Records(images, torch.arange(n)))


def physical(indices, n_slots=3):
    return PhysicalBatch(np.array(indices), n_slots, is_first=True, is_last=True)


def draw(indices=((1,), (3,)), n_slots=3, draws=K):
    return draw_rows(records(), physical(indices, n_slots), draws, STEPS, SecureRandom()).reveal()


def test_row_n_k_belongs_to_record_n():
    rows = draw()
    assert rows.labels.tolist() == [1] * K + [3] * K + [0] * K
    assert rows.latents[:, 0, 0, 0].tolist() == [1.0] * K + [3.0] * K + [0.0] * K


def test_row_n_m_k_belongs_to_record_m_of_unit_n():
    rows = draw(UNITS, draws=2)
    expected = [1, 1, 3, 3, 1, 1, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0]
    assert rows.labels.tolist() == expected
    assert (rows.latents.flatten(1) == torch.tensor(expected)[:, None]).all()


@pytest.mark.parametrize("m", [1, 3])
def test_shapes_do_not_depend_on_who_is_in_the_batch(m):
    for n in range(4):
        rows = draw(np.ones((n, m), dtype=np.int64))
        assert rows.latents.shape == rows.diffusion_noise.shape == (3 * m * K, 1, 2, 2)
        assert rows.timesteps.shape == rows.labels.shape == (3 * m * K,)


def test_slots_without_a_unit_hold_zeros_and_no_record():
    rows = draw(np.ones((1, 3), dtype=np.int64))
    assert not rows.latents[3 * K :].any()
    assert not rows.labels[3 * K :].any()


def test_each_draw_of_a_record_falls_in_its_own_stratum():
    for indices in (((1,), (3,)), UNITS):
        timesteps = torch.cat([draw(indices).timesteps for _ in range(50)]).reshape(-1, K)
        stratum = timesteps // (STEPS // K)
        assert torch.equal(stratum, torch.arange(K).expand_as(stratum))


@pytest.mark.parametrize("draws", [1, 4])
def test_the_rows_of_a_unit_fill_every_stratum_once(draws):
    indices = np.zeros((3, 5), dtype=np.int64)
    timesteps = torch.cat([draw(indices, draws=draws).timesteps for _ in range(20)])
    strata = (timesteps // (STEPS // (5 * draws))).reshape(-1, 5 * draws).sort(1).values
    assert torch.equal(strata, torch.arange(5 * draws).expand_as(strata))


def test_every_record_of_a_unit_has_uniform_timesteps_in_the_kth_of_each_draw():
    """A record tied to one of the M strata of each K-th would be learned at its steps alone."""
    m, draws, cells = 5, 2, 25
    indices = np.zeros((40, m), dtype=np.int64)
    timesteps = torch.cat([draw(indices, 40, draws).timesteps for _ in range(25)])
    timesteps = timesteps.reshape(-1, m, draws).numpy()  # 1000 independent units
    for record in range(m):
        for k in range(draws):
            cell = (timesteps[:, record, k] - k * STEPS // draws) // (STEPS // draws // cells)
            counts = np.bincount(cell, minlength=cells)
            assert len(counts) == cells
            assert stats.chisquare(counts).pvalue * m * draws > FALSE_ALARM


def test_timesteps_are_uniform_over_the_schedule():
    counts = torch.zeros(STEPS)
    for _ in range(4000 // 3):
        counts += torch.bincount(draw().timesteps, minlength=STEPS)
    expected = counts.sum() / STEPS
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Strata only lower the statistic of 1000 cells; 6 standard deviations above its mean allowed.
    assert chi_square < STEPS + 6 * (2 * STEPS) ** 0.5


N_SLOTS, N_BATCHES, CELLS = 8, 400, 10


def each_slots_timesteps(m=1):
    """Of one record in every slot, batch after batch, by one generator.  [batches, slots, M, K]"""
    random, batch = SecureRandom(), physical(np.zeros((N_SLOTS, m), dtype=np.int64), N_SLOTS)
    drawn = [draw_rows(records(), batch, K, STEPS, random).reveal() for _ in range(N_BATCHES)]
    timesteps = np.stack([rows.timesteps.numpy() for rows in drawn])
    return timesteps.reshape(N_BATCHES, N_SLOTS, m, K)


@pytest.mark.parametrize("m", [1, 3])
def test_the_timesteps_of_a_record_do_not_depend_on_its_slot(m):
    """In each slot, over the batches, they are uniform over the part of the schedule they have."""
    timesteps = each_slots_timesteps(m)
    part = STEPS // K
    cells = (timesteps - np.arange(K) * part) * CELLS // part
    for slot in range(N_SLOTS):
        for record in range(m):
            for k in range(K):
                counts = np.bincount(cells[:, slot, record, k], minlength=CELLS)
                assert len(counts) == CELLS
                p_value = stats.chisquare(counts).pvalue
                assert p_value * N_SLOTS * m * K > FALSE_ALARM


def test_timesteps_of_other_slots_draws_and_batches_tell_nothing():
    """Independent: each pair fills the CELLS² pairs of cells evenly, also from batch to batch."""
    timesteps = each_slots_timesteps()[:, :, 0]  # [batches, slots, K]
    part, cells = STEPS // K, 4
    cell = (timesteps - np.arange(K) * part) * cells // part
    flat = cell.reshape(N_BATCHES, N_SLOTS * K)
    pairs = [(flat[:, i], flat[:, j]) for i in range(N_SLOTS * K) for j in range(i)]
    pairs += [(flat[:-1, i], flat[1:, i]) for i in range(N_SLOTS * K)]
    for one, other in pairs:
        counts = np.bincount(one * cells + other, minlength=cells**2)
        assert stats.chisquare(counts).pvalue * len(pairs) > FALSE_ALARM


def test_latents_are_the_records_own_values():
    """Not scaled by anything of the data: other records change no bit of them."""
    alone = torch.full((1, 1, 2, 2), 0.3)
    for others in (0.0, 1e3, float("nan")):
        images = torch.cat([alone, torch.full((2, 1, 2, 2), others)])
        data = Private(Records(images, torch.zeros(3, dtype=torch.long)))
        batch = physical([[0], [1], [0]])
        rows = draw_rows(data, batch, K, STEPS, SecureRandom()).reveal()
        assert torch.equal(rows.latents[:K], alone.expand(K, -1, -1, -1))
        assert torch.equal(rows.latents[2 * K :], alone.expand(K, -1, -1, -1))


def test_diffusion_noise_is_standard_normal_and_fresh():
    first, second = (draw(draws=500).diffusion_noise.flatten() for _ in range(2))
    n = len(first)
    assert abs(float(first.mean())) < 5 / n**0.5
    assert abs(float(first.var()) - 1) < 5 * (2 / n) ** 0.5
    assert not (first == second).any()


def seeded_draw():
    torch.manual_seed(0)
    np.random.seed(0)
    return draw()


def test_a_seed_does_not_repeat_the_draws():
    first, second = (seeded_draw() for _ in range(2))
    assert not torch.equal(first.diffusion_noise, second.diffusion_noise)
    assert not torch.equal(first.timesteps, second.timesteps)


IN, MAX_GRAD_NORM = 4, 0.5


class Linear(nn.Module):
    """The linear model: one layer with an adapter, on the pixels of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(IN, 3)

    def forward(self, x):
        return self.to_q(x)

    def add_adapter(self, config, adapter_name):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


@pytest.fixture
def model() -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Linear()
        adapter.add_lora(model, rank=2, alpha=2.0, target_modules=("to_q",), seed=0)
        for param in model.parameters():
            param.data = 0.3 * torch.randn_like(param)
    return model.train()


def row_losses(model, x):
    return model(x).square().sum(1)


def clipped_sum(model, batch, x, rows_per_slot):
    """What one step without noise takes off the weights, by the engine."""
    model = copy.deepcopy(model)
    capture = Capture(model, draws_per_record=rows_per_slot)
    before = [param.detach().double().clone() for param in capture.parameters]
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=1.0,
    )
    capture.announce(batch.notice)
    row_losses(model, x).mean().backward()
    optimizer.step()
    assert not optimizer._is_last_step_skipped
    after = [param.detach().double() for param in capture.parameters]
    return torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)])


def average_grad(model, x):
    """The gradient of one unit in float64: the average over its rows, one at a time."""
    model = copy.deepcopy(model).double()
    params = [param for param in model.parameters() if param.requires_grad]
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(row_losses(model, r).sum(), params)])
        for r in x.double().split(1)
    ]
    return torch.stack(grads).mean(0)


def test_a_unit_contributes_the_clipped_average_over_its_rows(model):
    batch, m, draws = physical(UNITS, n_slots=4), 3, 2
    rows = draw_rows(records(), batch, draws, STEPS, SecureRandom()).reveal()
    x = (rows.latents + rows.diffusion_noise).flatten(1)
    expected = 0
    for n, unit in enumerate(batch.indices):
        own = rows.diffusion_noise.flatten(1)[n * m * draws : (n + 1) * m * draws]
        latents = records().reveal().images[unit].repeat_interleave(draws, 0).flatten(1)
        grad = average_grad(model, latents + own)
        expected = expected + grad * min(1.0, MAX_GRAD_NORM / float(grad.norm()))
    actual = clipped_sum(model, batch, x, m * draws)
    # Fourteen float32 weights of size 1, and gradients from chains of about ten roundings.
    assert float((actual - expected).norm()) < 64 * torch.finfo(torch.float32).eps


def test_a_unit_however_large_moves_the_sum_by_at_most_the_bound(model):
    """All of its records point one way, far beyond the bound, and they are every row it fills."""
    images = torch.ones(103, 1, 2, 2)
    images[3:] = 1e3
    batch = physical([[0, 0, 0, 0], [1, 2, 1, 2], [50, 3, 99, 7]], n_slots=4)
    data = Private(Records(images, torch.zeros(103, dtype=torch.long)))
    rows = draw_rows(data, batch, 2, STEPS, SecureRandom()).reveal()
    x = (rows.latents + rows.diffusion_noise).flatten(1)
    without = replace(batch, indices=batch.indices[:-1])
    moved = clipped_sum(model, batch, x, 8) - clipped_sum(model, without, x, 8)
    # Both runs round fourteen float32 weights of size 1, by half a unit in the last place each.
    rounding = 14**0.5 * torch.finfo(torch.float32).eps
    assert 0.99 * MAX_GRAD_NORM < float(moved.norm()) < MAX_GRAD_NORM + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_secure_normals_are_standard_normal(dtype):
    n = 200_003  # more than one piece, and no whole number of blocks
    drawn = secure_normal((n,), dtype=dtype)
    assert drawn.dtype == dtype
    for piece in drawn.double().split(2**16):
        z = piece.numpy()
        if dtype != torch.bfloat16:  # whose steps the test would see
            assert stats.kstest(z, "norm").pvalue > FALSE_ALARM
        chi2 = stats.chi2(len(z))
        statistic = np.square(z).sum()
        assert min(chi2.cdf(statistic), chi2.sf(statistic)) > FALSE_ALARM
        assert 2 * stats.norm.sf(abs(z.mean()) * len(z) ** 0.5) > FALSE_ALARM


def test_secure_normals_take_the_form_of_a_tensor():
    for like in (torch.ones(2, 3), torch.ones(4, dtype=torch.float16), torch.ones(2, 3).T):
        drawn = secure_normal_like(like)
        assert (drawn.shape, drawn.dtype) == (like.shape, like.dtype)
    assert secure_normal(5).shape == secure_normal([5]).shape == (5,)
    assert secure_normal(()).shape == ()
    assert secure_normal((0, 3)).shape == (0, 3)
    assert secure_normal_like(torch.ones(2, requires_grad=True)).requires_grad is False
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="dtype must be one of floats"):
            secure_normal(3, dtype=dtype)


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (-3, 4), (0, 1), (10**12, 10**12 + 7)])
def test_secure_integers_are_uniform_between_their_ends(low, high):
    drawn = secure_integers(low, high, (40, 500))
    assert (drawn.dtype, drawn.shape) == (torch.int64, (40, 500))
    counts = np.bincount((drawn - low).flatten().numpy(), minlength=high - low)
    assert len(counts) == high - low
    assert high - low == 1 or stats.chisquare(counts).pvalue > FALSE_ALARM


def test_secure_integers_reach_all_of_int64():
    ends = 2**63
    drawn = secure_integers(-ends, ends, 20_000).double().numpy() / ends
    assert stats.kstest(drawn, stats.uniform(-1, 2).cdf).pvalue > FALSE_ALARM
    assert (secure_integers(ends - 1, ends, 3) == ends - 1).all()
    assert (secure_integers(-ends, 1 - ends, 3) == -ends).all()
    for low, high in ((3, 3), (4, 3), (0, ends + 1), (-ends - 1, 0)):
        with pytest.raises(ValueError, match="low must be below high"):
            secure_integers(low, high, 3)


def test_a_seed_does_not_repeat_secure_draws():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        state = torch.get_rng_state()
        draws.append((secure_normal(50), secure_integers(0, 1000, 50)))
        assert torch.equal(torch.get_rng_state(), state)
    assert not (draws[0][0] == draws[1][0]).any()
    assert not torch.equal(draws[0][1], draws[1][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_secure_draws_on_a_gpu():
    drawn = secure_normal((300, 700), device="cuda", dtype=torch.bfloat16)
    assert (drawn.device.type, drawn.dtype, drawn.shape) == ("cuda", torch.bfloat16, (300, 700))
    z = secure_normal(100_000, device="cuda").cpu().numpy()
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM
    assert secure_integers(0, 10, 5, device="cuda").device.type == "cuda"
