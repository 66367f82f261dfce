"""The eager ops against loops over single records, exact sums and rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.kernels import reference

IN, OUT, SCALING = 48, 32, 0.7
TOKENS = {"2-D": (), "3-D": (7,), "4-D": (3, 5)}


def lora_inputs(n_records, draws, rank, tokens=(7,), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = (n_records * draws, *tokens)
    return normal(*rows, IN), normal(*rows, OUT), normal(rank, IN), normal(OUT, rank)


def autograd_loop(x, g, lora_a, lora_b, n_records, dtype):
    """u, grad_a and grad_b by one forward and backward for every record on its own."""
    x, g, lora_a, lora_b = (t.to(dtype) for t in (x, g, lora_a, lora_b))
    results = []
    for x_n, g_n in zip(x.chunk(n_records), g.chunk(n_records), strict=True):
        a, b = lora_a.clone().requires_grad_(), lora_b.clone().requires_grad_()
        h = x_n @ a.T
        loss = (g_n * (SCALING * (h @ b.T))).sum()
        u, grad_a, grad_b = torch.autograd.grad(loss, (h, a, b))
        results.append((u.reshape(-1, u.shape[-1]), grad_a, grad_b))
    u, grad_a, grad_b = zip(*results, strict=True)
    return torch.cat(u), torch.stack(grad_a), torch.stack(grad_b)


def assert_as_good_as_eager_autograd(x, g, lora_a, lora_b, n_records):
    exact = autograd_loop(x, g, lora_a, lora_b, n_records, torch.float64)
    eager = autograd_loop(x, g, lora_a, lora_b, n_records, torch.float32)
    ours = reference.lora_per_record_grads(x, g, lora_a, lora_b, SCALING, n_records)
    for name, e64, e32, value in zip(("u", "grad_a", "grad_b"), exact, eager, ours, strict=True):
        assert value.shape == e64.shape and value.dtype == torch.float32, name
        assert (value - e64).norm() <= 2 * (e32 - e64).norm(), name


@pytest.mark.parametrize("n_records", [1, 5], ids="N={}".format)
@pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
@pytest.mark.parametrize("rank", [1, 3, 17], ids="R={}".format)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_lora_grads_equal_a_loop_over_single_records(tokens, rank, draws, n_records):
    inputs = lora_inputs(n_records, draws, rank, tokens)
    assert_as_good_as_eager_autograd(*inputs, n_records)


def test_aligned_draws_add_up():
    x, g, lora_a, lora_b = lora_inputs(5, 1, 3)
    x, g = x.repeat_interleave(4, 0), g.repeat_interleave(4, 0)
    assert_as_good_as_eager_autograd(x, g, lora_a, lora_b, 5)


def test_orthogonal_draws_add_up():
    x, g, lora_a, lora_b = lora_inputs(5, 4, 3)
    for draw in range(4):
        outside = torch.ones(IN, dtype=torch.bool)
        outside[draw * 12 : (draw + 1) * 12] = False
        x[draw::4, :, outside] = 0
    assert_as_good_as_eager_autograd(x, g, lora_a, lora_b, 5)


def test_cancelling_draws_leave_the_gradient_of_their_sum():
    # Draws 0 and 1 are opposite and a million times as large as draws 2 and 3.
    x, g, lora_a, lora_b = lora_inputs(5, 4, 3)
    x[1::4] = x[0::4]
    g[0::4] *= 1e6
    g[1::4] = -g[0::4]
    assert_as_good_as_eager_autograd(x, g, lora_a, lora_b, 5)
    _, grad_a, grad_b = reference.lora_per_record_grads(x, g, lora_a, lora_b, SCALING, 5)
    kept = torch.arange(20) % 4 >= 2
    _, rest_a, rest_b = autograd_loop(x[kept], g[kept], lora_a, lora_b, 5, torch.float64)
    terms = 2 * 2 * 7 * 1e6  # size of what cancels, in units of the remainder
    for ours, rest in ((grad_a, rest_a), (grad_b, rest_b)):
        assert (ours - rest).norm() <= terms * 2**-24 * rest.norm()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
def test_a_record_has_the_same_bits_in_every_slot_and_beside_any_neighbours(draws, tokens):
    n_slots = 7
    x, g, lora_a, lora_b = lora_inputs(n_slots, draws, 3, tokens)
    record_x, record_g = x[:draws].clone(), g[:draws].clone()
    seen = []
    for slot in range(n_slots):
        x, g, _, _ = lora_inputs(n_slots, draws, 3, tokens, seed=slot + 1)
        x, g = x * 10.0 ** (slot - 3), g * 10.0 ** (3 - slot)
        x[slot * draws : (slot + 1) * draws] = record_x
        g[slot * draws : (slot + 1) * draws] = record_g
        _, *grads = reference.lora_per_record_grads(x, g, lora_a, lora_b, SCALING, n_slots)
        seen.append([grad[slot] for grad in grads])
    for grads in seen[1:]:
        assert all(map(torch.equal, grads, seen[0]))


def exact_sq_norm(*parts):
    values = [v for part in parts for v in part.flatten().tolist()]
    return sum(Fraction(v) ** 2 for v in values)


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
        assert abs(Fraction(value) - exact) <= n_elements * Fraction(2) ** -53 * exact


def test_sq_norms_do_not_round_the_squares_to_float32():
    grads = torch.full((1, 3), 1 + 2.0**-23)
    assert reference.sq_norms([grads]).item() == math.fsum([(1 + 2.0**-23) ** 2] * 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_sq_norms_are_not_finite_for_a_bad_record_alone(bad):
    grads = [torch.ones(4, 3), torch.ones(4, 2, 2)]
    grads[1][2, 1, 0] = bad
    sq_norms = reference.sq_norms(grads)
    assert sq_norms.isfinite().tolist() == [True, True, False, True]


bounds = st.floats(1e-6, 1e6)
near_one = st.integers(-(2**12), 2**12).map(lambda k: 1 + k * 2.0**-30)


def assert_factor_keeps_the_bound(sq_norm, bound):
    factor = reference.clip_factors(torch.tensor([sq_norm], dtype=torch.float64), bound)
    assert factor.dtype == torch.float32
    c = Fraction(factor.item())
    assert 0 <= c <= 1
    # The documented margin: true even if sq_norm is low by one part in 2**24.
    room = (1 - Fraction(2) ** -23) ** 2 * (1 - Fraction(2) ** -24)
    assert c**2 * Fraction(sq_norm) <= Fraction(bound) ** 2 * room
    if sq_norm <= (1e30 * bound) ** 2:  # no wider margin than four float32 steps
        largest = min(Fraction(1), Fraction(bound) ** 2 / Fraction(max(sq_norm, 1e-300)))
        assert c**2 >= largest * (1 - Fraction(2) ** -21) ** 2


@given(bound=bounds, ratio=near_one)
@settings(deadline=None)
def test_clip_factors_near_the_bound_never_round_upward(bound, ratio):
    assert_factor_keeps_the_bound((bound * ratio) ** 2, bound)


@given(bound=bounds, sq_norm=st.floats(0, 1e80))
@settings(deadline=None)
def test_clip_factors_keep_any_norm_within_the_bound(bound, sq_norm):
    assert_factor_keeps_the_bound(sq_norm, bound)


@pytest.mark.parametrize(
    ("sq_norm", "factor"),
    [(0.0, 1.0), (1e-300, 1.0), (0.24, 1.0), (math.inf, 0.0), (math.nan, 0.0)],
    ids=["zero", "tiny", "below", "inf", "nan"],
)
def test_clip_factors_at_the_ends(sq_norm, factor):
    sq_norms = torch.tensor([sq_norm], dtype=torch.float64)
    assert reference.clip_factors(sq_norms, 0.5).item() == factor


def random_records(n_records=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(n_records, *shape, generator=generator) for shape in ((5, 3), (1,), (17,))]
    return grads, torch.rand(n_records, generator=generator)


def test_weighted_sum_equals_a_float64_loop():
    grads, weights = random_records()
    keep = torch.arange(9) % 3 != 1
    for grad, total in zip(grads, reference.weighted_sum(grads, weights, keep), strict=True):
        assert total.dtype == torch.float64 and total.shape == grad.shape[1:]
        terms = [w.double() * g.double() for w, g, k in zip(weights, grad, keep, strict=True) if k]
        loop = torch.stack(terms).sum(0)
        size = torch.stack(terms).abs().sum(0)
        assert ((total - loop).abs() <= len(terms) * 2**-52 * size).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38], ids=str)
@pytest.mark.parametrize("slot", [0, 4, 8])
def test_a_record_that_is_not_kept_changes_no_bit_of_the_others(slot, garbage):
    grads, weights = random_records()
    keep = torch.arange(9) != slot
    zeros = [grad.clone() for grad in grads]
    for grad, zero in zip(grads, zeros, strict=True):
        grad[slot] = garbage
        zero[slot] = 0
    everything = torch.ones(9, dtype=torch.bool)
    sums = reference.weighted_sum(grads, weights, keep)
    assert all(map(torch.equal, sums, reference.weighted_sum(zeros, weights, everything)))


def test_a_sum_of_no_kept_records_is_zero():
    grads, weights = random_records()
    sums = reference.weighted_sum(grads, weights, torch.zeros(9, dtype=torch.bool))
    assert all((total == 0).all() for total in sums)


def test_the_gradient_of_a_scalar_parameter_is_one_number_for_each_record():
    grads, ones = [torch.tensor([3.0, 4.0])], torch.ones(2)
    assert reference.sq_norms(grads).tolist() == [9.0, 16.0]
    assert reference.weighted_sum(grads, ones, ones.bool())[0].item() == 7.0
