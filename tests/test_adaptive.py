"""Adaptive clipping: sum and count together cost one Gaussian, and the bound finds its quantile."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm

from dpengine import Capture, DPOptimizer
from dpengine.adaptive import Adaptive
from dpengine.clipping import ClippedSum, Flat, join
from dpengine.noise import noisy_mean
from dpengine.secure_random import SecureRandom

ONE = torch.ones(1, dtype=torch.bool)
SETTINGS = [(1.0, 12.8), (0.7, 0.36), (5.0, 2.6), (1e-3, 100.0), (1 / 3, 1 / 5)]
every_setting = pytest.mark.parametrize(("sigma", "count_stddev"), SETTINGS)


def records(n_records=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slab = torch.randn(n_records, 20, generator=generator)
    slab *= 10 ** torch.randn(n_records, 1, generator=generator)
    return [slab[:, :7], slab[:, 7:]]


@pytest.mark.parametrize("loss_scale", [1.0, 1 / 3, 64.0])
def test_the_sum_is_the_flat_one_under_this_bound(loss_scale):
    grads, is_record = records(), torch.arange(9) != 4
    ours, flat = (
        mode.clip_and_sum(grads, is_record, loss_scale=loss_scale)
        for mode in (Adaptive(0.7, 1.0), Flat(0.7))
    )
    assert torch.equal(ours.values, flat.values)
    assert ours.sensitivity == Adaptive(0.7, 1.0).sensitivity == 0.7


@pytest.mark.parametrize("loss_scale", [0.25, 1.0, 8.0])
def test_the_count_is_half_the_records_within_the_bound_less_half_of_those_beyond(loss_scale):
    grads, is_record = records(40), torch.arange(40) < 33
    count = Adaptive(5.0, 1.0).count(grads, is_record, loss_scale=loss_scale)
    norms = [loss_scale * math.hypot(*torch.cat([g[n] for g in grads]).tolist()) for n in range(33)]
    within = sum(norm <= 5.0 for norm in norms)
    assert 0 < within < 33
    assert count.values.tolist() == [(within - (33 - within)) / 2]
    assert count.values.dtype == torch.float64 and count.sensitivity == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("padding", [0.0, 1e38, math.nan, math.inf], ids="padding={}".format)
def test_bad_records_and_padding_count_exactly_zero(padding, bad):
    grads, is_record = records(), torch.arange(9) < 7
    grads[1][3, 2] = bad
    grads[0][7:] = padding
    mode = Adaptive(5.0, 1.0)
    alone = [mode.count([g[n : n + 1] for g in grads], ONE).values for n in range(7)]
    assert [vote.item() == 0 for vote in alone] == [n == 3 for n in range(7)]
    assert torch.equal(mode.count(grads, is_record).values, torch.stack(alone).sum(0))
    assert mode.count(grads, torch.zeros_like(is_record)).values.tolist() == [0.0]


def test_the_counts_of_physical_batches_add_up():
    grads, mode, everyone = records(), Adaptive(1.0, 1.0), torch.ones(9, dtype=torch.bool)
    parts = [
        mode.count([g[rows] for g in grads], everyone[rows]) for rows in (slice(0, 4), slice(4, 9))
    ]
    whole = mode.count(grads, everyone)
    assert torch.equal(join(*parts).values, whole.values)


values = st.floats(width=32) | st.sampled_from([1e-45, 3e38, 0.6, 0.8, 1.0, 1 + 2.0**-23])


def squared_shift(record, mode, sigma, loss_scale=1.0):
    """Squared norm of what a record adds to sum and count, each over its noise's deviation."""
    v = mode.clip_and_sum(record, ONE, loss_scale=loss_scale)
    w = mode.count(record, ONE, loss_scale=loss_scale)
    sum_stddev = Fraction(mode.sum_noise_multiplier(sigma)) * Fraction(v.sensitivity)
    count_stddev = Fraction(mode.count_noise_multiplier) * Fraction(w.sensitivity)
    assert count_stddev == Fraction(mode.count_noise_stddev)
    sq_norm = sum(Fraction(value) ** 2 for value in v.values.tolist())
    return sq_norm / sum_stddev**2 + Fraction(w.values.item()) ** 2 / count_stddev**2


@every_setting
@given(
    record=st.lists(values, min_size=1, max_size=6),
    bound=st.floats(1e-6, 1e6),
    loss_scale=st.sampled_from([1.0, 1 / 3, 64.0]),
)
@settings(deadline=None, max_examples=50)
def test_no_record_shifts_sum_and_count_by_more_than_one_gaussian_allows(
    sigma, count_stddev, record, bound, loss_scale
):
    tensors = [torch.tensor([record])]
    shift = squared_shift(tensors, Adaptive(bound, count_stddev), sigma, loss_scale)
    assert shift <= Fraction(sigma) ** -2
    if not all(map(math.isfinite, record)):
        assert shift == 0


@every_setting
@pytest.mark.parametrize("value", [1.0001, 0.9999999, 1e10], ids=str)
def test_records_at_the_bound_and_beyond_use_up_the_whole_shift(value, sigma, count_stddev):
    shift = squared_shift([torch.tensor([[value]])], Adaptive(1.0, count_stddev), sigma)
    assert shift >= Fraction(sigma) ** -2 * (1 - Fraction(2) ** -20)


@every_setting
def test_the_noise_multiplier_of_the_sum_is_rounded_up_from_its_formula(sigma, count_stddev):
    multiplier = Adaptive(1.0, count_stddev).sum_noise_multiplier(sigma)
    exact = 1 / (Fraction(sigma) ** -2 - (2 * Fraction(count_stddev)) ** -2)
    assert exact <= Fraction(multiplier) ** 2 <= exact * (1 + Fraction(2) ** -49)


def gaussian_delta(mu, epsilon):
    """δ(ε) of the Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    upper = norm.cdf(mu / 2 - epsilon / mu)
    return upper - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def pair_delta(v, w, sum_stddev, count_stddev, epsilon):
    """δ(ε) of the pair itself: the integral of ``max(0, p - e^ε q)`` over both answers."""
    x, y = (np.linspace(-9, 9, 1801) * s for s in (sum_stddev, count_stddev))
    p = np.outer(norm.pdf(x, v / 2, sum_stddev), norm.pdf(y, w / 2, count_stddev))
    q = np.outer(norm.pdf(x, -v / 2, sum_stddev), norm.pdf(y, -w / 2, count_stddev))
    cell = (x[1] - x[0]) * (y[1] - y[0])
    return np.maximum(p - math.exp(epsilon) * q, 0).sum() * cell


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("sigma", "count_stddev"), [(1.0, 12.8), (0.7, 0.36), (2.0, 1.3)])
@pytest.mark.parametrize("w", [0.5, -0.5], ids="vote={}".format)
def test_the_privacy_of_the_pair_is_that_of_one_gaussian(w, sigma, count_stddev, epsilon):
    bound = 0.3
    mode = Adaptive(bound, count_stddev)
    sum_stddev = mode.sum_noise_multiplier(sigma) * mode.sensitivity
    delta = pair_delta(bound, w, sum_stddev, count_stddev, epsilon)
    # The error of the grid is of the order of its step squared, 1e-4 of the density.
    assert delta == pytest.approx(gaussian_delta(1 / sigma, epsilon), abs=1e-4)
    without_count = pair_delta(bound, 0.0, sum_stddev, count_stddev, epsilon)
    assert without_count < gaussian_delta(1 / sigma, epsilon)


def test_the_noise_of_the_count_has_the_deviation_asked_for():
    mode, n_draws = Adaptive(1.0, 6.0), 100_000
    zeros = ClippedSum(torch.zeros(n_draws, dtype=torch.float64), 0.5)
    noisy = noisy_mean(zeros, mode.count_noise_multiplier, 2.0, SecureRandom())
    # The variance of n draws has a relative deviation of √(2/n); six of them.
    assert noisy.var().item() == pytest.approx(3.0**2, rel=6 * math.sqrt(2 / n_draws))


def test_without_noise_on_the_sum_there_is_none():
    assert Adaptive(1.0, 1.0).sum_noise_multiplier(0.0) == 0.0


@pytest.mark.parametrize("sigma", [2.0, 2.1, 100.0])
def test_a_count_that_costs_more_than_the_budget_is_refused(sigma):
    with pytest.raises(ValueError, match=r"count_noise_stddev.*half of the noise multiplier"):
        Adaptive(1.0, 1.0).sum_noise_multiplier(sigma)


@pytest.mark.parametrize(
    ("share", "change"), [(1.0, -0.5), (0.0, 0.5), (0.5, 0.0)], ids="share={}".format
)
def test_the_next_bound_moves_against_the_surplus_of_records_within_it(share, change):
    mode = Adaptive(3.0, 2.0, learning_rate=0.2)
    following = mode.next(share - 0.5)
    assert following.max_grad_norm == pytest.approx(3 * math.exp(0.2 * change), rel=1e-14)
    assert following == Adaptive(following.max_grad_norm, 2.0, learning_rate=0.2)
    assert mode.max_grad_norm == 3.0


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_the_bound_settles_at_the_quantile_of_the_norms(start, quantile):
    norms = torch.randn(2001, 1, generator=torch.Generator().manual_seed(0)).exp()
    mode, everyone = Adaptive(start, 1.0, quantile), torch.ones(2001, dtype=torch.bool)
    for _ in range(1000):
        mode = mode.next(mode.count([norms], everyone).values.item() / 2001)
    within = (norms <= mode.max_grad_norm).double().mean().item()
    assert within == pytest.approx(quantile, abs=0.02)


@pytest.mark.parametrize("field", ["max_grad_norm", "count_noise_stddev", "learning_rate"])
@pytest.mark.parametrize("value", [-0.0, -1.0, math.nan, math.inf], ids=str)
def test_a_number_that_is_out_of_range_is_refused(field, value):
    if field == "learning_rate" and value == 0:
        value = -1e-9  # 0 keeps the bound
    with pytest.raises(ValueError, match=field):
        Adaptive(**{"max_grad_norm": 1.0, "count_noise_stddev": 1.0, field: value})


def test_a_rate_of_zero_keeps_the_bound_and_releases_the_noised_share():
    mode = Adaptive(3.0, 2.0, learning_rate=0.0)
    assert mode.noisy_share is None
    for noisy_count_mean, share in ((0.2, 0.7), (-0.7, 0.0), (0.9, 1.0)):
        mode = mode.next(noisy_count_mean)
        assert (mode.max_grad_norm, mode.noisy_share) == (3.0, pytest.approx(share))


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.1, math.nan], ids=str)
def test_a_quantile_outside_its_range_is_refused(quantile):
    with pytest.raises(ValueError, match="quantile"):
        Adaptive(1.0, 1.0, quantile)


def test_the_sum_is_noised_by_the_bound_that_clipped_it():
    """The count moves the bound of the next batch; here it falls to a fifth in one step."""
    model = torch.nn.Linear(200, 200, bias=False).train()
    capture = Capture(model)
    mode = Adaptive(2.0, 0.3, quantile=0.01, learning_rate=3.0)
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=0.5,
        max_grad_norm=2.0,
        expected_batch_size=10.0,
        clipping=mode,
    )
    (1e-6 * model(torch.randn(1, 200)).sum()).backward()
    optimizer.pre_step()
    assert optimizer.max_grad_norm < 1
    stddev = mode.sum_noise_multiplier(0.5) * 2.0 / 10
    values = model.weight.grad.double().flatten()
    chi2 = stats.chi2(values.numel())
    statistic = float((values / stddev).square().sum())
    assert 2 * min(chi2.cdf(statistic), chi2.sf(statistic)) > 1e-9
