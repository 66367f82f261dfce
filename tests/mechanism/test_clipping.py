"""Clipping: the bound holds for each contribution exactly, whatever the record holds."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.mechanism.clipping import Automatic, ClippedSum, Flat, PerLayer, empty_sum, join

LOSS_SCALES = pytest.mark.parametrize("loss_scale", [1.0, 1 / 3, 64.0], ids="scale={:.3g}".format)


def nearly_flat(bound):
    """Automatic clipping whose gamma leaves a norm near the bound no slack."""
    return Automatic(bound, gamma=max(bound * 1e-12, 1e-300))


MODES = pytest.mark.parametrize(
    "mode_of", [Flat, nearly_flat, Automatic, PerLayer], ids=["flat", "tight", "auto", "layers"]
)


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


def clip(grads, is_record, mode, loss_scale=1.0):
    return mode.clip_and_sum(grads, is_record, loss_scale=loss_scale)


def contribution(record, mode, loss_scale=1.0):
    """What one record adds to the sum."""
    tensors = [part[None] for part in record]
    return clip(tensors, torch.ones(1, dtype=torch.bool), mode, loss_scale).values


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


@MODES
@LOSS_SCALES
def test_no_adversarial_record_contributes_more_than_the_bound(loss_scale, mode_of):
    for record, bound in adversarial_records(200, 2**12, seed=0):
        scaled = [part / loss_scale for part in record]
        assert not exceeds([contribution(scaled, mode_of(bound), loss_scale)], bound)


float32s = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)


@MODES
@given(
    record=st.lists(float32s, min_size=1, max_size=4),
    bound=st.floats(1e-6, 1e6),
    loss_scale=st.sampled_from([1.0, 1 / 3, 64.0]),
    bfloat16=st.booleans(),
)
@settings(deadline=None)
def test_no_record_that_hypothesis_finds_contributes_more_than_the_bound(
    mode_of, record, bound, loss_scale, bfloat16
):
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    tensors = [torch.tensor(part).to(dtype) for part in record]
    added = contribution(tensors, mode_of(bound), loss_scale)
    assert not exceeds([added], bound)
    if not all(tensor.isfinite().all() for tensor in tensors):
        assert (added == 0).all()


@MODES
def test_bfloat16_records_are_bounded_as_stored(mode_of):
    for record, bound in adversarial_records(100, 2**12, seed=3):
        stored = [part.bfloat16() for part in record]
        assert not exceeds([contribution(stored, mode_of(bound))], bound)


CORNERS = [0.0, 1e-45, -1e-45, 1.1754944e-38, 1e-30, 0.6, -0.8, 1.0, 1 + 2.0**-23, 3e38, -3.4e38]


@MODES
@pytest.mark.parametrize("bound", [1e-30, 0.1, 1.0, 1.0000001, 2.5e38], ids="C={:g}".format)
def test_records_of_corner_values_are_bounded_in_rational_arithmetic(bound, mode_of):
    for left in CORNERS:
        for right in CORNERS:
            parts = [torch.tensor([left, right]), torch.tensor([right])]
            values = contribution(parts, mode_of(bound)).tolist()
            assert sum(Fraction(value) ** 2 for value in values) <= Fraction(bound) ** 2


def columns_of_one_slab(dtype, n_records=9, seed=0):
    """Three groups of parameters that lie side by side in one slab, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    slab = torch.randn(n_records, 40, generator=generator).to(dtype)
    return [slab[:, 1:8], slab[:, 10:11], slab[:, 20:33]]


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("others", ["aligned", "opposite", "orthogonal", "huge", "random"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20], ids="scale={:g}".format)
def test_one_record_more_moves_the_sum_by_at_most_the_sensitivity(scale, others, dtype, mode_of):
    groups = columns_of_one_slab(dtype)
    for group in groups:
        group[0] *= scale
        if others in ("aligned", "opposite", "huge"):
            group[1:] = group[0] * {"aligned": 1, "opposite": -1, "huge": 1e17}[others]
        elif others == "orthogonal":
            group[0, ::2], group[1:, 1::2] = 0, 0
    mode, everyone = mode_of(0.7), torch.ones(9, dtype=torch.bool)
    moved = clip(groups, everyone, mode).values.tolist()
    without = clip(groups, torch.arange(9) > 0, mode).values.tolist()
    # The margin of the factors is wider than the rounding of a sum of nine.
    distance = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(moved, without, strict=True))
    assert distance <= Fraction(mode.sensitivity) ** 2


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_record_adds_the_same_bits_from_every_slot_of_a_slab(dtype, mode_of):
    record, seen = [group[0].clone() for group in columns_of_one_slab(dtype)], []
    for slot in range(9):
        groups = columns_of_one_slab(dtype, seed=slot + 1)
        for group, own in zip(groups, record, strict=True):
            group *= 10.0 ** (slot - 4)
            group[slot] = own
        seen.append(clip(groups, torch.arange(9) == slot, mode_of(0.7)).values)
    assert all(torch.equal(values, seen[0]) for values in seen)


def random_grads(n_records, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.randn(n_records, generator=generator)
    shapes = ((4, 3), (7,), (2, 2, 2))
    return [
        torch.randn(n_records, *shape, generator=generator) * scale.view(-1, *[1] * len(shape))
        for shape in shapes
    ]


def flat_loop(record, bound):
    norm = math.sqrt(sum(part.square().sum().item() for part in record))
    return [min(1, bound / norm) * part for part in record]


def automatic_loop(record, bound, gamma=0.01):
    norm = math.sqrt(sum(part.square().sum().item() for part in record))
    return [bound / (norm + gamma) * part for part in record]


def per_layer_loop(record, bound):
    bound /= math.sqrt(len(record))
    return [min(1, bound / part.norm().item()) * part for part in record]


@LOSS_SCALES
@pytest.mark.parametrize(
    ("mode_of", "loop_of"),
    [(Flat, flat_loop), (Automatic, automatic_loop), (PerLayer, per_layer_loop)],
    ids=["flat", "auto", "layers"],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0], ids="scale={:g}".format)
def test_the_sum_equals_a_float64_loop_over_records(loss_scale, mode_of, loop_of, scale):
    grads, bound = [scale * grad for grad in random_grads(30)], 2.0
    clipped = clip(grads, torch.ones(30, dtype=torch.bool), mode_of(bound), loss_scale)
    loop = [torch.zeros(grad.shape[1:], dtype=torch.float64) for grad in grads]
    for n in range(30):
        record = [loss_scale * grad[n].double() for grad in grads]
        for total, part in zip(loop, loop_of(record, bound), strict=True):
            total += part
    assert clipped.sensitivity == bound
    assert clipped.values.dtype == torch.float64
    expected = torch.cat([total.flatten() for total in loop])
    # The factor is low by at most 2**-21, for each of 30 records within the bound.
    assert (clipped.values - expected).abs().max() <= 30 * bound * 2**-21


@pytest.mark.parametrize("bound", [1e-3, 0.7, 100.0])
def test_a_record_clearly_below_the_bound_is_not_changed(bound):
    record = [torch.tensor([0.3, -0.4]) * bound, torch.tensor([[0.5]]) * bound]
    expected = torch.cat([part.flatten() for part in record]).double()
    for mode in (Flat(bound), PerLayer(bound)):
        assert torch.equal(contribution(record, mode), expected)


@pytest.mark.parametrize("gamma", [1e-300, 1e-30, 0.01], ids="gamma={:g}".format)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 3e38], ids="size={:g}".format)
def test_automatic_factors_never_overflow(size, gamma):
    added = contribution([torch.full((3,), size)], Automatic(1e30, gamma))
    assert added.isfinite().all() and not exceeds([added], 1e30)


@pytest.mark.parametrize("bound", [1e-40, 0.1, 1.0, math.pi, 1e38], ids="C={:g}".format)
def test_the_bounds_of_the_groups_compose_to_the_sensitivity(bound):
    for n_groups in (*range(1, 400), 2_000, 10_007):
        squares = n_groups * Fraction(PerLayer(bound).group_bound(n_groups)) ** 2
        assert Fraction(bound) ** 2 * (1 - Fraction(2) ** -50) <= squares <= Fraction(bound) ** 2


def test_groups_that_are_all_clipped_reach_their_bounds_and_no_more():
    groups = [torch.full((1, size), 3.0) for size in (1, 5, 100)]
    total = clip(groups, torch.ones(1, dtype=torch.bool), PerLayer(0.7)).values
    for part in total.split([1, 5, 100]):
        assert not exceeds([part], 0.7 / math.sqrt(3))
    assert exceeds([total], 0.7 * (1 - 2**-21))


BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)


@MODES
@BAD
@pytest.mark.parametrize("tensor", [0, 1, 2], ids="tensor={}".format)
@pytest.mark.parametrize("slot", [0, 3, 7], ids="slot={}".format)
def test_a_bad_record_contributes_exactly_zero_and_leaves_the_others_alone(
    slot, tensor, bad, mode_of
):
    grads, everyone = random_grads(8), torch.ones(8, dtype=torch.bool)
    zeros = [grad.clone() for grad in grads]
    for zero in zeros:
        zero[slot] = 0
    grads[tensor][slot].view(-1)[-1] = bad
    mode = mode_of(1.0)
    assert torch.equal(clip(grads, everyone, mode).values, clip(zeros, everyone, mode).values)


@MODES
@BAD
def test_a_bad_record_alone_sums_to_zero(bad, mode_of):
    assert contribution([torch.tensor([1.0, bad])], mode_of(1.0)).tolist() == [0.0, 0.0]


@MODES
@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e38, math.nan, math.inf], ids=str)
def test_padding_contributes_exactly_zero_whatever_it_holds(garbage, mode_of):
    grads, is_record = random_grads(8), torch.arange(8) < 5
    zeros = [grad.clone() for grad in grads]
    for grad, zero in zip(grads, zeros, strict=True):
        grad[5:] = garbage
        zero[5:] = 0
    everyone, mode = torch.ones(8, dtype=torch.bool), mode_of(1.0)
    assert torch.equal(clip(grads, is_record, mode).values, clip(zeros, everyone, mode).values)


@pytest.mark.parametrize("physical_batch_size", [65_536, 1024], ids="b={}".format)
def test_many_aligned_records_neither_pass_the_bound_nor_lose_it(physical_batch_size):
    n_records, bound = 65_536, 0.1
    record = torch.tensor([0.3, -0.7, 1.1])
    grads = [record.expand(physical_batch_size, 3)]
    everyone = torch.ones(physical_batch_size, dtype=torch.bool)
    batch = total = clip(grads, everyone, Flat(bound))
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
    clipped = clip(grads, torch.ones(5, dtype=torch.bool), Flat(0.7))
    empty = empty_sum(clipped.values.numel(), 0.7, torch.device("cpu"))
    assert (empty.values == 0).all() and empty.values.dtype == torch.float64
    joined = join(empty, clipped)
    assert joined.sensitivity == empty.sensitivity == 0.7
    assert torch.equal(joined.values, clipped.values)


@MODES
@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_a_bound_that_is_not_positive_is_refused(bound, mode_of):
    with pytest.raises(ValueError, match="max_grad_norm"):
        mode_of(bound)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_a_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        Automatic(1.0, gamma)


def test_a_clipped_sum_prints_no_private_value():
    assert "0.123" not in repr(ClippedSum(torch.tensor([0.123]), 1.0))
