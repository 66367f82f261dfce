"""Clipping: the bound holds for each contribution exactly, whatever the record holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.clipping import ClippedSum, clip_and_sum, empty_sum, join

LOSS_SCALES = pytest.mark.parametrize("loss_scale", [1.0, 1 / 3, 64.0], ids="scale={:.3g}".format)


def split(values):
    """High and low halves of float64 values, so that products of halves are exact."""
    high = values.float().double()
    return high, values - high


def exceeds(tensors, bound):
    """Whether the joint L2 norm is above ``bound``, decided exactly."""
    high, low = split(torch.cat([t.flatten().double() for t in tensors]))
    terms = torch.cat([high * high, 2 * high * low, low * low]).tolist()
    b_high, b_low = (part.item() for part in split(torch.tensor(bound, dtype=torch.float64)))
    # fsum rounds the exact sum once, so its sign is right.
    return math.fsum([*terms, -b_high * b_high, -2 * b_high * b_low, -b_low * b_low]) > 0


def test_exceeds_sees_one_unit_in_the_last_place():
    assert not exceeds([torch.tensor([3.0]), torch.tensor([4.0])], 5.0)
    assert exceeds([torch.tensor([3.0]), torch.tensor([4.0])], math.nextafter(5.0, 0))


def clip(grads, is_record, bound, loss_scale=1.0):
    return clip_and_sum(grads, is_record, bound, loss_scale=loss_scale)


def contribution(record, bound, loss_scale=1.0):
    """What one record adds to the sum."""
    tensors = [part[None] for part in record]
    return clip(tensors, torch.ones(1, dtype=torch.bool), bound, loss_scale).values


def adversarial_records(count, max_dim, seed):
    """Records of hostile shape, each with a bound; many have a norm a hair above it."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        dim = int(2 ** (torch.rand((), generator=generator) * math.log2(max_dim)))
        flat = torch.randn(dim, generator=generator)
        kind = index % 5
        if kind == 1:  # all elements equal: every rounding goes the same way
            flat = torch.full((dim,), flat[0].item())
        elif kind == 2:  # one giant, many dwarfs
            flat *= 1e-30
            flat[0] = 1e38
        elif kind == 3:  # subnormal
            flat *= 1e-40
        elif kind == 4:  # from 1e-37 to 1e37
            flat *= 10.0 ** (74 * torch.rand(dim, generator=generator) - 37)
        norm = flat.double().norm().item()
        nudge = 1 + 2.0**-40 * 2 ** (20 * torch.rand((), generator=generator).item())
        bound = norm / nudge if index % 2 else float(10 ** torch.randn((), generator=generator))
        half = dim // 2
        yield [flat[:half].reshape(-1, 1), flat[half:]], max(bound, 1e-40)


@LOSS_SCALES
def test_no_adversarial_record_contributes_more_than_the_bound(loss_scale):
    for record, bound in adversarial_records(600, 2**12, seed=0):
        scaled = [part / loss_scale for part in record]
        assert not exceeds(contribution(scaled, bound, loss_scale), bound)


@pytest.mark.slow
@LOSS_SCALES
def test_no_million_adversarial_records_contribute_more_than_the_bound(loss_scale):
    for record, bound in adversarial_records(1_000_000 // 3, 2**6, seed=1):
        scaled = [part / loss_scale for part in record]
        assert not exceeds(contribution(scaled, bound, loss_scale), bound)


@pytest.mark.slow
@LOSS_SCALES
def test_no_record_of_a_million_elements_contributes_more_than_the_bound(loss_scale):
    for record, bound in adversarial_records(100, 2**20, seed=2):
        scaled = [part / loss_scale for part in record]
        assert not exceeds(contribution(scaled, bound, loss_scale), bound)


@given(
    record=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    bound=st.floats(1e-6, 1e6),
    loss_scale=st.sampled_from([1.0, 1 / 3, 64.0]),
)
@settings(deadline=None)
def test_no_record_that_hypothesis_finds_contributes_more_than_the_bound(record, bound, loss_scale):
    assert not exceeds([contribution([torch.tensor(record)], bound, loss_scale)], bound)


def test_bfloat16_records_are_bounded_as_stored():
    for record, bound in adversarial_records(100, 2**12, seed=3):
        stored = [part.bfloat16() for part in record]
        assert not exceeds([contribution(stored, bound)], bound)


def random_grads(n_records, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.randn(n_records, generator=generator)
    shapes = ((4, 3), (7,), (2, 2, 2))
    return [
        torch.randn(n_records, *shape, generator=generator) * scale.view(-1, *[1] * len(shape))
        for shape in shapes
    ]


@LOSS_SCALES
def test_the_sum_equals_a_float64_loop_over_records(loss_scale):
    grads, bound = random_grads(30), 2.0
    clipped = clip(grads, torch.ones(30, dtype=torch.bool), bound, loss_scale)
    loop = [torch.zeros(grad.shape[1:], dtype=torch.float64) for grad in grads]
    for n in range(30):
        record = [loss_scale * grad[n].double() for grad in grads]
        norm = math.sqrt(sum(part.square().sum().item() for part in record))
        for total, part in zip(loop, record, strict=True):
            total += min(1, bound / norm) * part
    assert clipped.sensitivity == bound
    assert clipped.values.dtype == torch.float64
    expected = torch.cat([total.flatten() for total in loop])
    # The factor is low by at most 2**-21, for each of 30 records within the bound.
    assert (clipped.values - expected).abs().max() <= 30 * bound * 2**-21


@pytest.mark.parametrize("bound", [1e-3, 0.7, 100.0])
def test_a_record_clearly_below_the_bound_is_not_changed(bound):
    record = [torch.tensor([0.3, -0.4]) * bound, torch.tensor([[0.5]]) * bound]
    expected = torch.cat([part.flatten() for part in record]).double()
    assert torch.equal(contribution(record, bound), expected)


BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)


@BAD
@pytest.mark.parametrize("tensor", [0, 1, 2], ids="tensor={}".format)
@pytest.mark.parametrize("slot", [0, 3, 7], ids="slot={}".format)
def test_a_bad_record_contributes_exactly_zero_and_leaves_the_others_alone(slot, tensor, bad):
    grads, everyone = random_grads(8), torch.ones(8, dtype=torch.bool)
    zeros = [grad.clone() for grad in grads]
    for zero in zeros:
        zero[slot] = 0
    grads[tensor][slot].view(-1)[-1] = bad
    assert torch.equal(clip(grads, everyone, 1.0).values, clip(zeros, everyone, 1.0).values)


@BAD
def test_a_bad_record_alone_sums_to_zero(bad):
    assert contribution([torch.tensor([1.0, bad])], 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e38, math.nan, math.inf], ids=str)
def test_padding_contributes_exactly_zero_whatever_it_holds(garbage):
    grads, is_record = random_grads(8), torch.arange(8) < 5
    zeros = [grad.clone() for grad in grads]
    for grad, zero in zip(grads, zeros, strict=True):
        grad[5:] = garbage
        zero[5:] = 0
    everyone = torch.ones(8, dtype=torch.bool)
    assert torch.equal(clip(grads, is_record, 1.0).values, clip(zeros, everyone, 1.0).values)


@pytest.mark.parametrize("physical_batch_size", [65_536, 1024], ids="b={}".format)
def test_many_aligned_records_neither_pass_the_bound_nor_lose_it(physical_batch_size):
    n_records, bound = 65_536, 0.1
    record = torch.tensor([0.3, -0.7, 1.1])
    grads = [record.expand(physical_batch_size, 3)]
    everyone = torch.ones(physical_batch_size, dtype=torch.bool)
    batch = total = clip(grads, everyone, bound)
    for _ in range(n_records // physical_batch_size - 1):
        total = join(total, batch)
    assert not exceeds([total.values], n_records * bound)
    assert exceeds([total.values], n_records * bound * (1 - 2**-21))


def test_join_adds_the_sums_and_keeps_the_sensitivity():
    left, right = (random_grads(2, seed)[0].double().flatten() for seed in (1, 2))
    joined = join(ClippedSum(left, 0.5), ClippedSum(right, 0.5))
    assert joined.sensitivity == 0.5
    assert torch.equal(joined.values, left + right)


def test_join_refuses_sums_of_different_sensitivity():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"sensitivity.*0\.5 and 0\.6"):
        join(ClippedSum(ones, 0.5), ClippedSum(ones, 0.6))


def test_the_empty_sum_is_neutral_under_join():
    grads = random_grads(5)
    clipped = clip(grads, torch.ones(5, dtype=torch.bool), 0.7)
    empty = empty_sum(clipped.values.numel(), 0.7, torch.device("cpu"))
    assert (empty.values == 0).all() and empty.values.dtype == torch.float64
    joined = join(empty, clipped)
    assert joined.sensitivity == empty.sensitivity == 0.7
    assert torch.equal(joined.values, clipped.values)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan], ids=str)
def test_a_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match="max_grad_norm"):
        contribution([torch.ones(3)], bound)


def test_a_clipped_sum_prints_no_private_value():
    assert "0.123" not in repr(ClippedSum(torch.tensor([0.123]), 1.0))
