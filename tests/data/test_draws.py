"""The draws of a physical batch: layout, strata, padding, secrecy, and what a unit contributes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats
from torch import nn

from dpengine import Capture, DPOptimizer, secure_integers, secure_normal, secure_normal_like
from dpengine.data.draws import draw_rows
from dpengine.data.records import Records
from dpengine.mechanism.private import Private
from dpengine.mechanism.sampling import PhysicalBatch
from dpengine.mechanism.secure_random import SecureRandom
from dpengine.models import adapter, make_path, make_times

K, STEPS = 4, 1000
UNIFORM = make_times("uniform", make_path(DDPMScheduler()))
FALSE_ALARM = 1e-7
UNITS = ((1, 3, 1), (5, 5, 5))
"""Two units with M = 3: one of two records that takes turns, one of a single record."""


def records(n: int = 6) -> Private[Records]:
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, 2, 2)
    labels = torch.arange(n)
    return Private(Records(images, labels, conditions={"labels": labels}))


def physical(indices, n_slots=3):
    return PhysicalBatch(np.array(indices), n_slots, is_first=True, is_last=True)


def draw(indices=((1,), (3,)), n_slots=3, draws=K):
    return draw_rows(records(), physical(indices, n_slots), draws, UNIFORM, SecureRandom()).reveal()


def test_row_n_k_belongs_to_record_n():
    rows = draw()
    assert rows["labels"].tolist() == [1] * K + [3] * K + [0] * K
    assert rows["latents"][:, 0, 0, 0].tolist() == [1.0] * K + [3.0] * K + [0.0] * K


def test_row_n_m_k_belongs_to_record_m_of_unit_n():
    rows = draw(UNITS, draws=2)
    expected = [1, 1, 3, 3, 1, 1, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0]
    assert rows["labels"].tolist() == expected
    assert (rows["latents"].flatten(1) == torch.tensor(expected)[:, None]).all()


@pytest.mark.parametrize("m", [1, 3])
def test_shapes_do_not_depend_on_who_is_in_the_batch(m):
    for n in range(4):
        rows = draw(np.ones((n, m), dtype=np.int64))
        assert rows["latents"].shape == rows["diffusion_noise"].shape == (3 * m * K, 1, 2, 2)
        assert rows["times"].shape == rows["labels"].shape == (3 * m * K,)


def test_slots_without_a_unit_hold_zeros_and_no_record():
    rows = draw(np.ones((1, 3), dtype=np.int64))
    assert not rows["latents"][3 * K :].any()
    assert not rows["labels"][3 * K :].any()


def test_each_draw_of_a_record_falls_in_its_own_stratum():
    for indices in (((1,), (3,)), UNITS):
        timesteps = torch.cat([draw(indices)["times"] for _ in range(50)]).reshape(-1, K)
        stratum = timesteps // (STEPS // K)
        assert torch.equal(stratum, torch.arange(K).expand_as(stratum))


@pytest.mark.parametrize("law", ["logit-normal", "edm"])
def test_each_draw_falls_in_its_own_stratum_of_any_law(law):
    """The k-th of K in the k-th part of equal probability."""
    times = make_times(law, make_path(DDPMScheduler()))
    edges = torch.from_numpy(times(np.arange(K + 1) / K))
    batch, drawn = physical(((1,), (3,))), []
    for _ in range(50):
        rows = draw_rows(records(), batch, K, times, SecureRandom()).reveal()
        drawn.append(rows["times"].reshape(-1, K))
    drawn = torch.cat(drawn)
    assert (edges[:-1] <= drawn).all() and (drawn <= edges[1:]).all()
    assert (edges[:-1] < edges[1:]).all()


@pytest.mark.parametrize("draws", [1, 4])
def test_the_rows_of_a_unit_fill_every_stratum_once(draws):
    indices = np.zeros((3, 5), dtype=np.int64)
    timesteps = torch.cat([draw(indices, draws=draws)["times"] for _ in range(20)])
    strata = (timesteps // (STEPS // (5 * draws))).reshape(-1, 5 * draws).sort(1).values
    assert torch.equal(strata, torch.arange(5 * draws).expand_as(strata))


def test_every_record_of_a_unit_has_uniform_timesteps_in_the_kth_of_each_draw():
    """A record tied to one of the M strata of each K-th would be learned at its steps alone."""
    m, draws, cells = 5, 2, 25
    indices = np.zeros((40, m), dtype=np.int64)
    timesteps = torch.cat([draw(indices, 40, draws)["times"] for _ in range(25)])
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
        counts += torch.bincount(draw()["times"], minlength=STEPS)
    expected = counts.sum() / STEPS
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Strata only lower the statistic of 1000 cells; 6 standard deviations above its mean allowed.
    assert chi_square < STEPS + 6 * (2 * STEPS) ** 0.5


def test_diffusion_noise_is_standard_normal_and_fresh():
    first, second = (draw(draws=500)["diffusion_noise"].flatten() for _ in range(2))
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
    assert not torch.equal(first["diffusion_noise"], second["diffusion_noise"])
    assert not torch.equal(first["times"], second["times"])


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
    capture.announcements.announce(batch.notice)
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
    rows = draw_rows(records(), batch, draws, UNIFORM, SecureRandom()).reveal()
    x = (rows["latents"] + rows["diffusion_noise"]).flatten(1)
    expected = 0
    for n, unit in enumerate(batch.indices):
        own = rows["diffusion_noise"].flatten(1)[n * m * draws : (n + 1) * m * draws]
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
    rows = draw_rows(data, batch, 2, UNIFORM, SecureRandom()).reveal()
    x = (rows["latents"] + rows["diffusion_noise"]).flatten(1)
    without = replace(batch, indices=batch.indices[:-1])
    moved = clipped_sum(model, batch, x, 8) - clipped_sum(model, without, x, 8)
    # Both runs round fourteen float32 weights of size 1, by half a unit in the last place each.
    rounding = 14**0.5 * torch.finfo(torch.float32).eps
    assert 0.99 * MAX_GRAD_NORM < float(moved.norm()) < MAX_GRAD_NORM + rounding


def test_a_seed_does_not_repeat_what_a_loop_draws():
    x = torch.empty(8, 8)
    for draw in (
        lambda: secure_normal((8, 8)),
        lambda: secure_normal_like(x),
        lambda: secure_integers(0, 1000, (64,)),
    ):
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)
            drawn.append(draw())
        assert not torch.equal(*drawn)


def test_what_a_loop_draws_has_the_law_that_is_said():
    normals = secure_normal((100, 2, 50)).flatten()
    assert stats.kstest(normals.numpy(), "norm").pvalue > FALSE_ALARM
    integers = secure_integers(-3, 4, (7000,))
    counts = np.bincount(integers.numpy() + 3, minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_loop_draws_has_the_shape_and_type_that_is_asked_for(dtype):
    like = torch.empty(3, 0, 2, dtype=dtype)
    assert secure_normal_like(like).shape == like.shape
    assert secure_normal((2, 3), dtype=dtype).dtype == secure_normal_like(like).dtype == dtype
    integers = secure_integers(5, 6, (2, 3), device="cpu")
    assert integers.dtype == torch.int64 and integers.tolist() == [[5] * 3] * 2
    assert secure_normal(5).shape == secure_integers(0, 9, 5).shape == (5,)
    assert secure_normal(()).shape == ()
    for ends in ((4, 4), (5, 4), (0, 2**63 + 1), (-(2**63) - 1, 0), (-1, 2**63)):
        with pytest.raises(
            ValueError, match=r"low must be below high.* got {} and {}".format(*ends)
        ):
            secure_integers(*ends, (1,))
    assert secure_integers(2**63 - 1, 2**63, 2).tolist() == [2**63 - 1] * 2
    for of_no_floats in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="dtype must be one of floats"):
            secure_normal((3,), dtype=of_no_floats)


def test_timesteps_do_not_follow_the_slot():
    """Over many batches each slot meets all timesteps alike, by a chi-square over ten bins."""
    images, labels = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    batch = PhysicalBatch(np.arange(3)[:, None], 4, is_first=True, is_last=True)
    random, records = SecureRandom(), Private(Records(images, labels))
    drawn = torch.stack(
        [draw_rows(records, batch, 1, UNIFORM, random).reveal()["times"] for _ in range(2000)]
    )
    for slot in range(4):
        counts = torch.bincount(drawn[:, slot] // 100, minlength=10)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-9
