"""What is right at small sizes and in the first steps must be so at real sizes and after many.

Sizes are past the blocks that things are done in, 2^16 to 2^20 values, and numbers past what a
counter or a cache might hold: a thousand steps, five thousand draws and charges, a hundred physical
batches. Statistical tests reject a right engine with a chance of at most ``FALSE_ALARM``.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dpengine import Adaptive, Capture, DPOptimizer
from dpengine.accounting import spent
from dpengine.data import records as data
from dpengine.dropin.accountant import Accountant, Mechanism
from dpengine.kernels import reference
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.mechanism.private import Private
from dpengine.mechanism.sampling import PoissonSampler, cut
from dpengine.mechanism.secure_random import SecureRandom

FALSE_ALARM = 1e-9
BOUND, SIGMA = 0.5, 2.0


def private(model, sigma=SIGMA):
    capture = Capture(model.train())
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=BOUND,
        expected_batch_size=1.0,
    )
    return capture, optimizer


def noise_only_step(capture, optimizer, width):
    """The noise of a step on an empty batch, over its standard deviation.  float64 [P]"""
    capture.announcements.announce(BatchNotice(Private(0), 1, is_first=True, is_last=True))
    capture.module(torch.zeros(1, width)).sum().backward()
    optimizer.step()
    noise = torch.cat([param.grad.flatten() for param in capture.parameters]).double()
    optimizer.zero_grad()
    return noise / (SIGMA * BOUND)


def is_standard(z):
    """Whether the sum of squares is that of standard normals; a grid adds two millionths to it."""
    law, total = stats.chi2(z.numel()), float(z.square().sum())
    return 2 * min(law.cdf(total), law.sf(total)) > FALSE_ALARM


def test_every_part_of_a_large_model_is_noised_afresh_in_every_step():
    """1,117,250 values in two layers; of the noise of a step nothing is in that of the next."""
    model = nn.Sequential(nn.Linear(1056, 1056), nn.Linear(1056, 1))
    capture, optimizer = private(model)
    steps = [noise_only_step(capture, optimizer, 1056) for _ in range(4)]
    assert steps[0].numel() > 2**20 + 2**15
    correlated = norms = 0.0
    for before, after in zip([None, *steps], steps, strict=False):
        assert all(map(is_standard, after.split(2**16)))
        if before is not None:
            correlated, norms = correlated + float(before @ after), norms + float(before @ before)
    # Given the noise of the steps before, the product with fresh noise is normal.
    assert 2 * stats.norm.sf(abs(correlated) / math.sqrt(norms)) > FALSE_ALARM


def many_steps(n_steps):
    capture, optimizer = private(nn.Linear(7, 8))
    noise = torch.stack([noise_only_step(capture, optimizer, 7) for _ in range(n_steps)])
    assert all(map(is_standard, noise.split(50)))
    assert len(noise[:, 0].unique()) > 100  # on a grid of about a thousand points
    rows = noise.unique(dim=0)
    assert len(rows) == n_steps


def test_the_thousandth_step_is_noised_as_the_first():
    many_steps(1050)


@pytest.mark.slow
def test_the_ten_thousandth_step_is_noised_as_the_first():
    many_steps(10_000)


def test_a_bound_that_falls_and_rises_is_that_of_each_steps_sum_and_noise():
    """By a factor of thousands and back: a record beyond every bound adds each step's own."""
    model = nn.Linear(256, 256, bias=False)
    capture = Capture(model.train())
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=1.0,
        clipping=Adaptive(BOUND, 50.0, learning_rate=2.0),
    )
    bounds = []
    for step in range(40):
        before = optimizer.clipping
        bounds.append(before.max_grad_norm)
        model(torch.full((1, 256), 1e3)).sum().backward()  # a gradient of one value throughout
        optimizer.step()
        # The average of 65,536 values has the sum's own, C / 256, and 1/256 of their noise.
        stddev = before.sum_noise_multiplier(SIGMA) * before.max_grad_norm
        released = model.weight.grad.double().flatten()
        error = float(released.mean()) - before.max_grad_norm / 256
        assert 2 * stats.norm.sf(abs(error) / (stddev / 256)) > FALSE_ALARM
        assert is_standard((released - before.max_grad_norm / 256) / stddev)
        optimizer.zero_grad()
        # The count's noise is wide, so its share is 0 or 1: let the quantile lead.
        quantile = 0.01 if step < 20 else 0.99
        optimizer.clipping = replace(optimizer.clipping, quantile=quantile)
    assert min(bounds) < BOUND / 1000 and bounds[-1] > 1000 * min(bounds)


def test_no_word_comes_twice_in_a_draw_of_two_million():
    words = np.sort(SecureRandom().words(2**21 + 5))  # two are equal with a chance of 1e-7
    assert (words[1:] != words[:-1]).all()


def test_every_block_of_a_large_slab_is_clipped_and_selected():
    """Two records of 100 blocks, one to be clipped and one with NaN, both in the last columns."""
    grads = torch.zeros(2, 100 * 2**17)
    grads[0, -3:] = torch.tensor([6.0, 2.0, 3.0])
    grads[1, -1] = math.nan
    keep = torch.ones(2, dtype=torch.bool)
    total = reference.clip_and_sum([grads], reference.sq_norms([grads]), keep, 0.7, 1.0)
    assert not total[:-3].any()
    assert total[-3:].tolist() == pytest.approx([0.6, 0.2, 0.3], rel=1e-6)
    assert float(total.norm()) <= 0.7


def test_every_record_of_a_large_batch_is_selected_in_a_product():
    """200 records, of which the last is not to be kept."""
    left, right = torch.ones(200, 1, 3), torch.ones(200, 1, 4)
    keep, weights = torch.arange(200) < 199, torch.full((200,), 0.5)
    total = reference.weighted_product(left, right, weights, keep)
    assert torch.equal(total, torch.full((3, 4), 99.5, dtype=torch.float64))


def test_a_hundred_physical_batches_are_one_sum_of_clipped_records():
    """Each record has its own input and clips to a unit vector: every value is one of them."""
    model = nn.Linear(300, 1, bias=False)
    capture, optimizer = private(model, sigma=0.0)
    before = model.weight.detach().clone()
    for number, rows in enumerate((5 * torch.eye(300)).split(3)):
        notice = BatchNotice(Private(3), 3, is_first=number == 0, is_last=number == 99)
        capture.announcements.announce(notice)
        model(rows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (before - model.weight.detach()).flatten()
    torch.testing.assert_close(moved, torch.full((300,), BOUND), rtol=2e-6, atol=2e-7)


def test_a_logical_batch_of_hundreds_of_passes_holds_each_unit_once():
    batches = cut(np.arange(2001)[:, None], 8)
    assert len(batches) == 251
    assert [int(i) for batch in batches for i in batch.indices.ravel()] == list(range(2001))
    assert [batch.is_last for batch in batches].count(True) == 1


def test_no_two_of_five_thousand_steps_toss_the_same_coins():
    """128 fair coins a step: two steps agree with a chance below 1e-31."""
    plan = PrivacyPlan(
        sampling_rate=0.5,
        noise_multiplier=1.0,
        num_steps=5000,
        max_grad_norm=1.0,
        delta=1e-5,
        public_dataset_size=128,
        adjacency="add-remove",
        draws_per_record=1,
        trainable_parameters=1,
    )
    sampler = PoissonSampler(
        128,
        plan,
        num_steps=5000,
        physical_batch_size=128,
        reserve=lambda: None,
        announce=lambda notice: None,
    )
    taken = [batch.indices.tobytes() for batch in sampler]
    assert len(taken) == len(set(taken)) == 5000


def test_five_thousand_charges_cost_five_thousand_steps():
    accountant, step = Accountant(), Mechanism(0.01, 1.0, 8, "add-remove")
    for _ in range(5000):
        accountant.charge(step)
    assert len(accountant) == 5000 and accountant.history == [(1.0, 0.01, 5000)]
    assert accountant.get_epsilon(1e-5) == spent(0.01, 1.0, 5000, 1e-5, 8).upper


def test_one_image_among_ten_thousand_is_what_it_is_alone(tmp_path):
    """No number of the data set, nor of a part of it, enters an image."""
    images = np.random.default_rng(0).integers(0, 256, (10_000, 8, 8), np.uint8)
    images[5000:] //= 4  # a later part is much darker
    path, names = tmp_path / "private.npz", [str(digit) for digit in range(10)]

    def load(chosen):
        np.savez(path, images=images[chosen], labels=np.zeros(len(images[chosen]), int))
        return data.load(str(path), names, 1, 8).images

    everyone = load(slice(None))
    for chosen in ([0, 4095, 4096, 8191, 8192, 9999], [5000], [9999, 0]):
        assert torch.equal(everyone[chosen], load(chosen))
