"""The draws of a physical batch: layout, strata, padding and secrecy."""

import numpy as np
import torch

from dpengine.data import Records
from dpengine.draws import draw_rows
from dpengine.sampling import PhysicalBatch
from dpengine.secure_random import SecureRandom

K, STEPS = 4, 1000


def records(n: int = 6) -> Records:
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, 2, 2)
    return Records(images, torch.arange(n))


def draw(indices=(1, 3), n_slots=3, draws=K):
    batch = PhysicalBatch(np.array(indices, dtype=np.int64), n_slots, is_first=True, is_last=True)
    return draw_rows(records(), batch, draws, STEPS, SecureRandom())


def test_row_n_k_belongs_to_record_n():
    rows = draw()
    assert rows.labels.tolist() == [1] * K + [3] * K + [0] * K
    assert rows.latents[:, 0, 0, 0].tolist() == [1.0] * K + [3.0] * K + [0.0] * K


def test_shapes_do_not_depend_on_who_is_in_the_batch():
    for indices in ((), (0,), (0, 1, 2)):
        rows = draw(indices)
        assert rows.latents.shape == rows.diffusion_noise.shape == (3 * K, 1, 2, 2)
        assert rows.timesteps.shape == rows.labels.shape == (3 * K,)


def test_each_draw_of_a_record_falls_in_its_own_stratum():
    timesteps = torch.cat([draw().timesteps for _ in range(50)]).reshape(-1, K)
    stratum = timesteps // (STEPS // K)
    assert torch.equal(stratum, torch.arange(K).expand_as(stratum))


def test_timesteps_are_uniform_over_the_schedule():
    counts = torch.zeros(STEPS)
    n = 4000
    for _ in range(n // 3):
        counts += torch.bincount(draw().timesteps, minlength=STEPS)
    expected = counts.sum() / STEPS
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Strata only lower the statistic of 1000 cells; 6 standard deviations above its mean allowed.
    assert chi_square < STEPS + 6 * (2 * STEPS) ** 0.5


def test_diffusion_noise_is_standard_normal_and_fresh():
    first, second = (draw(draws=500).diffusion_noise.flatten() for _ in range(2))
    n = len(first)
    assert abs(float(first.mean())) < 5 / n**0.5
    assert abs(float(first.var()) - 1) < 5 * (2 / n) ** 0.5
    assert not (first == second).any()


def test_a_seed_does_not_repeat_the_draws():
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(0)
    second = draw()
    assert not torch.equal(first.diffusion_noise, second.diffusion_noise)
    assert not torch.equal(first.timesteps, second.timesteps)
