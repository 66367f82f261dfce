"""Norms, clip factors and clipped sums against exact sums and rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dpengine.kernels import reference

SHAPES = ((5, 3), (1,), (17,), ())
N_ELEMENTS = 15 + 1 + 17 + 1
NARROW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL = torch.ones(9, dtype=torch.bool)


def exact_sq_norm(*parts):
    return sum((Fraction(v) ** 2 for part in parts for v in part.flatten().tolist()), Fraction(0))


@pytest.mark.parametrize("scale", [1.0, 1e38, 1e-45, 1e-20], ids="scale={:g}".format)
def test_sq_norms_are_exact_up_to_the_rounding_of_a_float64_sum(scale):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.rand(6, *s, generator=generator).mul_(scale) for s in ((9, 11), (1,), (130,))]
    n_elements = 9 * 11 + 1 + 130
    sq_norms = reference.sq_norms(grads)
    assert sq_norms.dtype == torch.float64
    for n, value in enumerate(sq_norms.tolist()):
        exact = exact_sq_norm(*(grad[n] for grad in grads))
        assert exact > 0
        assert abs(Fraction(value) - exact) <= (n_elements + 3) * Fraction(2) ** -53 * exact


def test_sq_norms_do_not_round_the_squares_to_float32():
    exact = 3 * Fraction(1 + 2.0**-23) ** 2
    value = reference.sq_norms([torch.full((1, 3), 1 + 2.0**-23)]).item()
    assert abs(Fraction(value) - exact) <= 6 * Fraction(2) ** -53 * exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_sq_norms_are_not_finite_for_a_bad_record_alone(bad):
    grads = [torch.ones(4, 3), torch.ones(4, 2, 2)]
    grads[1][2, 1, 0] = bad
    assert reference.sq_norms(grads).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("value", [1.1, 1e-45, 1.1e-38, 3.4e38], ids="{:g}".format)
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("n_elements", [1, 7, 2**18 + 3], ids="P={}".format)
def test_equal_elements_of_any_size_lose_no_more_than_the_stated_rounding(n_elements, dtype, value):
    stored = torch.tensor(value).to(dtype)
    if not 0 < stored < math.inf:
        return
    slab = stored.expand(2, n_elements + 1).contiguous()[:, 1:]
    exact = n_elements * Fraction(stored.item()) ** 2
    for computed in reference.sq_norms([slab]).tolist():
        assert abs(Fraction(computed) - exact) <= (n_elements + 3) * Fraction(2) ** -53 * exact


def test_partial_norms_of_unequal_widths_are_summed_for_each_record():
    partial = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [math.inf]])]
    total = reference.sum_sq_norms([p.double() for p in partial])
    assert total.dtype == torch.float64 and total.tolist() == [3.5, math.inf]


def test_partial_norms_are_summed_in_float64():
    partial = [torch.tensor([[1.0, 2.0**-50]], dtype=torch.float64)] * 2
    assert reference.sum_sq_norms(partial).item() == 2 + 2.0**-49


def test_the_gradient_of_a_scalar_parameter_is_one_number_for_each_record():
    grads = [torch.tensor([3.0, 4.0])]
    sq_norms = reference.sq_norms(grads)
    assert sq_norms.tolist() == [9.0, 16.0]
    assert reference.clip_and_sum(grads, sq_norms, ALL[:2], 100.0, 1.0).tolist() == [7.0]


bounds = st.floats(1e-6, 1e6)
near_one = st.integers(-(2**12), 2**12).map(lambda k: 1 + k * 2.0**-30)


def factor_of(sq_norm, bound, gamma=None):
    sq_norms = torch.tensor([sq_norm], dtype=torch.float64)
    factors = reference.clip_factors(sq_norms, bound, gamma)
    assert factors.dtype == torch.float64 and factors.shape == (1,)
    factor = Fraction(factors.item())
    # Its product with a float32 element fits the 53 bits of a float64.
    assert (math.frexp(factors.item())[0] * 2**24).is_integer()
    return factor


def at_most(c, sq_norm, gamma, limit):
    """Whether ``c (√sq_norm + gamma) <= limit``, decided exactly."""
    room = limit - c * gamma
    return room >= 0 and c**2 * sq_norm <= room**2


def assert_factor_keeps_the_bound(sq_norm, bound, gamma=None):
    c = factor_of(sq_norm, bound, gamma)
    assert 0 <= c <= (1 if gamma is None else 2**127)
    added, sq_norm, bound = Fraction(gamma or 0), Fraction(sq_norm), Fraction(bound)
    # The documented margin, and four roundings in float64.
    limit = bound * (1 - Fraction(2) ** -22) * (1 + Fraction(4, 2**53))
    assert at_most(c, sq_norm, added, limit)
    # So the promise holds even if sq_norm is low by one part in 2**24.
    assert c**2 * sq_norm * (1 + Fraction(2) ** -23) <= bound**2
    # No wider margin than four float32 steps.
    if c < (1 if gamma is None else 2**127) * (1 - Fraction(2) ** -21):
        assert not at_most(c, sq_norm, added, bound * (1 - Fraction(2) ** -21))


@given(bound=bounds, ratio=near_one)
@settings(deadline=None)
def test_clip_factors_near_the_bound_never_round_upward(bound, ratio):
    assert_factor_keeps_the_bound((bound * ratio) ** 2, bound)


@given(bound=bounds, sq_norm=st.floats(0, 1e80))
@settings(deadline=None)
def test_clip_factors_keep_any_norm_within_the_bound(bound, sq_norm):
    assert_factor_keeps_the_bound(sq_norm, bound)


@given(bound=bounds, sq_norm=st.floats(0, 1e80), gamma=st.floats(1e-300, 1e6))
@settings(deadline=None)
def test_automatic_factors_keep_any_norm_within_the_bound(bound, sq_norm, gamma):
    assert_factor_keeps_the_bound(sq_norm, bound, gamma)


@given(bound=bounds, ratio=near_one, exponent=st.floats(-30, 3))
@settings(deadline=None)
def test_automatic_factors_of_a_gamma_beside_the_norm_never_round_upward(bound, ratio, exponent):
    assert_factor_keeps_the_bound((bound * ratio) ** 2, bound, bound * 10**exponent)


@pytest.mark.parametrize("steps", [0.75, 1.75, 2.5, 1e3])
def test_factors_below_the_normal_float32_range_do_not_round_upward(steps):
    assert_factor_keeps_the_bound((2.0**149 / steps) ** 2, 1.0)


def test_factors_of_powers_of_two_are_the_documented_margin_below_them():
    for exponent in range(-140, 140):
        factor = factor_of(4.0**exponent, 1.0)
        assert factor == min(1, Fraction(2) ** -exponent * (1 - Fraction(2) ** -22))


@pytest.mark.parametrize(
    ("sq_norm", "gamma", "factor"),
    [
        (0.0, None, 1.0),
        (1e-300, None, 1.0),
        (0.24, None, 1.0),
        (math.inf, None, 0.0),
        (math.nan, None, 0.0),
        (0.0, 0.5, 1 - 2.0**-22),
        (0.0, 2.0**-20, 2.0**19 * (1 - 2.0**-22)),
        (0.0, 1e-300, 2.0**127),
        (math.inf, 0.01, 0.0),
        (math.nan, 0.01, 0.0),
    ],
    ids=str,
)
def test_clip_factors_at_the_ends(sq_norm, gamma, factor):
    assert factor_of(sq_norm, 0.5, gamma) == factor


def records(dtype=torch.float32, scale=1.0, n_records=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n_records, *s, generator=generator)).to(dtype) for s in SHAPES]


def flat(grads):
    return torch.cat([grad.reshape(len(grad), -1).double() for grad in grads], 1)


def one_record(slot):
    return torch.arange(9) == slot


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, 0.3, 1e-6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4], ids="scale={:g}".format)
@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_a_record_contributes_at_most_the_bound_and_no_less_than_clipping_asks(
    dtype, scale, loss_scale
):
    grads, bound = records(dtype, scale), 0.7
    sq_norms = reference.sq_norms(grads)
    for slot in range(9):
        total = reference.clip_and_sum(grads, sq_norms, one_record(slot), bound, loss_scale)
        assert total.dtype == torch.float64 and total.shape == (N_ELEMENTS,)
        contribution = exact_sq_norm(total)
        unclipped = exact_sq_norm(flat(grads)[slot]) * Fraction(loss_scale) ** 2
        wanted = min(Fraction(bound) ** 2, unclipped)
        assert wanted * (1 - Fraction(2) ** -21) ** 2 <= contribution <= Fraction(bound) ** 2


def test_a_clipped_record_keeps_its_direction_and_the_order_of_its_elements():
    grads = records(scale=100.0)
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), one_record(3), 1.0, 1.0)
    row = flat(grads)[3]
    factor = (total / row)[0]
    # One rounding of each product and one of each quotient.
    assert ((total - factor * row).abs() <= 4 * 2.0**-53 * total.abs()).all()
    assert 0 < factor < 1


def test_records_below_the_bound_are_added_up_as_they_are():
    grads = [grad.mul(4).round() for grad in records()]
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), ALL, 1e6, 8.0)
    assert torch.equal(total, 8 * flat(grads).sum(0))


def test_the_clipped_sum_is_the_sum_of_the_clipped_records():
    grads, keep = records(scale=3.0), torch.arange(9) % 3 != 1
    sq_norms = reference.sq_norms(grads)
    total = reference.clip_and_sum(grads, sq_norms, keep, 0.7, 0.3)
    alone = [reference.clip_and_sum(grads, sq_norms, one_record(n), 0.7, 0.3) for n in range(9)]
    kept = torch.stack([row for row, k in zip(alone, keep, strict=True) if k])
    assert ((total - kept.sum(0)).abs() <= 2 * 9 * 2.0**-53 * kept.abs().sum(0)).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38], ids=str)
@pytest.mark.parametrize("slot", [0, 4, 8])
def test_a_record_that_is_not_kept_changes_no_bit_of_the_others(slot, garbage):
    grads, zeros = records(), records()
    for grad, zero in zip(grads, zeros, strict=True):
        grad[slot], zero[slot] = garbage, 0
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), ~one_record(slot), 0.7, 2.0)
    without = reference.clip_and_sum(zeros, reference.sq_norms(zeros), ALL, 0.7, 2.0)
    assert torch.equal(total, without)


def test_removing_many_records_leaves_the_order_in_which_the_others_are_added():
    keep = torch.arange(70) % 3 != 1
    grads, zeros = records(n_records=70), records(n_records=70)
    for grad, zero in zip(grads, zeros, strict=True):
        grad[~keep], zero[~keep] = math.nan, 0
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), keep, 0.7, 0.3)
    every = torch.ones(70, dtype=torch.bool)
    without = reference.clip_and_sum(zeros, reference.sq_norms(zeros), every, 0.7, 0.3)
    assert torch.equal(total, without)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("slot", [0, 4, 8])
def test_a_kept_record_with_one_bad_value_changes_no_bit_of_the_others(slot, bad):
    grads, zeros = records(), records()
    grads[2][slot, 5] = bad
    for zero in zeros:
        zero[slot] = 0
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), ALL, 0.7, 2.0)
    assert torch.equal(
        total, reference.clip_and_sum(zeros, reference.sq_norms(zeros), ALL, 0.7, 2.0)
    )


def test_a_record_whose_norm_overflows_under_the_loss_scale_adds_nothing():
    grads = [torch.tensor([[1e100], [2.0**-300]], dtype=torch.float64)]
    sq_norms = reference.sq_norms(grads)
    assert sq_norms.isfinite().all()
    assert reference.clip_and_sum(grads, sq_norms, ALL[:2], 1.0, 2.0**200) == 2.0**-100


def test_a_sum_of_no_kept_records_is_zero():
    grads = records()
    total = reference.clip_and_sum(grads, reference.sq_norms(grads), ~ALL, 0.7, 1.0)
    assert total.shape == (N_ELEMENTS,) and (total == 0).all()


def test_a_sum_of_no_records_is_zero():
    grads = records(n_records=0)
    sq_norms = reference.sq_norms(grads)
    assert sq_norms.shape == (0,) and reference.clip_factors(sq_norms, 1.0).shape == (0,)
    total = reference.clip_and_sum(grads, sq_norms, ALL[:0], 0.7, 1.0)
    assert total.shape == (N_ELEMENTS,) and (total == 0).all()


def test_clip_and_sum_leaves_its_arguments_as_they_were():
    grads, before = records(), records()
    keep = one_record(2)
    reference.clip_and_sum(grads, reference.sq_norms(grads), keep, 0.7, 2.0)
    assert all(map(torch.equal, grads, before)) and torch.equal(keep, one_record(2))


@pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
def test_automatic_clipping_weighs_each_record_by_its_own_factor(dtype):
    grads, bound, loss_scale, gamma = records(dtype, scale=0.1), 0.7, 0.3, 0.05
    sq_norms = reference.sq_norms(grads)
    total = reference.clip_and_sum(grads, sq_norms, ALL, bound, loss_scale, gamma)
    scaled = loss_scale * flat(grads)
    exact = (bound / (scaled.norm(dim=1, keepdim=True) + gamma) * scaled).sum(0)
    assert ((total - exact).abs() <= 2.0**-21 * bound * 9).all()
    assert not torch.equal(total, reference.clip_and_sum(grads, sq_norms, ALL, bound, loss_scale))


@pytest.mark.parametrize("gamma", [None, 0.01], ids="gamma={}".format)
def test_a_slab_of_many_blocks_has_the_sums_and_norms_of_its_columns(gamma):
    n_records, n_elements = 7, 3 * (reference._BLOCK // 7) + 11
    generator = torch.Generator().manual_seed(0)
    slab = torch.randn(n_records, n_elements, generator=generator)
    sq_norms, keep = reference.sq_norms([slab]), torch.arange(n_records) != 3
    assert torch.allclose(sq_norms, slab.double().square().sum(1), rtol=n_elements * 2**-53, atol=0)
    total = reference.clip_and_sum([slab], sq_norms, keep, 0.7, 0.3, gamma)
    for columns in (slice(0, 5), slice(37_440, 37_460), slice(n_elements - 5, n_elements)):
        part = reference.clip_and_sum([slab[:, columns]], sq_norms, keep, 0.7, 0.3, gamma)
        assert ((total[columns] - part).abs() <= 7 * 2.0**-52 * slab[:, columns].abs().sum(0)).all()


class LargestWide(TorchDispatchMode):
    """Remembers the largest float64 tensor that an operator returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("n_records", [4, 16])
def test_float64_copies_of_a_slab_are_small(n_records):
    n_elements = reference._BLOCK // 2
    slab, keep = torch.ones(n_records, n_elements), torch.ones(n_records, dtype=torch.bool)
    with LargestWide() as seen:
        reference.clip_and_sum([slab], reference.sq_norms([slab]), keep, 0.7, 1.0)
    assert n_elements <= seen.largest <= reference._BLOCK


def test_clipping_writes_into_no_float64_argument():
    grads = [torch.full((2, 3), 5.0, dtype=torch.float64)]
    sq_norms = reference.sq_norms(grads)
    reference.clip_and_sum(grads, sq_norms, ~ALL[:2], 0.7, 2.0)
    assert (grads[0] == 5).all() and torch.allclose(sq_norms, torch.tensor(75.0).double())


def test_norms_are_of_all_blocks():
    """32 records of SD 1.5 at rank 4 fill 97 blocks of 2^18 elements."""
    grads = torch.zeros(2, 100 * 2**17)
    grads[1, -10:] = 1
    assert reference.sq_norms([grads]).tolist() == pytest.approx([0, 10], rel=1e-14)
