"""Weights that are clipped without keeping their gradients: what is clipped is what was measured.

The bounds are checked in rational arithmetic on the products as computed, which
``weighted_product`` hands out for a weight of 1.
"""

import math
from fractions import Fraction

import pytest
import torch

from dpengine.kernels import reference

LEFT, RIGHT, N_RECORDS = 6, 9, 5
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
TOKENS = {"2-D": (), "3-D": (7,), "4-D": (3, 5)}
KINDS = ("independent", "aligned", "orthogonal", "cancelling", "opposite")
ALL = torch.ones(N_RECORDS, dtype=torch.bool)

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_layout = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
every_draws = pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
every_kind = pytest.mark.parametrize("kind", KINDS)


def factors(kind="independent", draws=4, tokens=(7,), dtype=torch.float32, large=1e6, seed=0):
    """left and right; ``cancelling`` draws leave a small rest, ``opposite`` ones nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = (N_RECORDS * draws, *tokens)
    left = torch.randn(*rows, LEFT, generator=generator)
    right = torch.randn(*rows, RIGHT, generator=generator)
    if kind == "aligned":
        left, right = (t[::draws].repeat_interleave(draws, 0) for t in (left, right))
    if kind == "orthogonal":
        for draw in range(draws):
            left[draw::draws, ..., torch.arange(LEFT) % draws != draw] = 0
    if kind in ("cancelling", "opposite"):
        left[0::draws] *= large
        left[1::draws], right[1::draws] = -left[0::draws], right[0::draws]
    if kind == "opposite":
        left[2::draws] = left[3::draws] = 0
    return left.to(dtype), right.to(dtype)


def products_as_clipped(left, right, n_records=N_RECORDS):
    """float64 [N, L, D]: each record's product, bit for bit as ``weighted_product`` uses it."""
    slots = torch.eye(n_records, dtype=torch.bool)
    ones = torch.ones(n_records)
    return torch.stack([reference.weighted_product(left, right, ones, own) for own in slots])


def exact_sq_norm(values):
    return sum((Fraction(v) ** 2 for v in values.flatten().tolist()), Fraction(0))


def in_float64(left, right, n_records=N_RECORDS):
    """The exact products and the sizes of what is summed, [N, L, D]."""
    left, right = (t.double().reshape(n_records, -1, t.shape[-1]) for t in (left, right))
    return left.mT @ right, left.abs().mT @ right.abs()


@every_dtype
@every_draws
@every_layout
def test_products_are_sums_over_all_rows_of_a_record(tokens, draws, dtype):
    left, right = factors(draws=draws, tokens=tokens, dtype=dtype)
    exact, sizes = in_float64(left, right)
    kept = reference.per_record_product(left, right, N_RECORDS)
    assert kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    n_terms = draws * torch.Size(tokens).numel()
    # Higham, section 3.1: each float64 sum against the other, or float32 against float64.
    gamma = (n_terms + 1) * torch.finfo(kept.dtype).eps
    for products in (kept, products_as_clipped(left, right)):
        assert ((products - exact).abs() <= gamma * sizes).all()


@every_dtype
@pytest.mark.parametrize(("kind", "draws"), [("independent", 1), *((kind, 4) for kind in KINDS)])
def test_the_squared_norm_is_that_of_the_product_that_is_clipped(kind, draws, dtype):
    large = 1e3 if dtype == torch.float16 else 1e6
    left, right = factors(kind, draws, dtype=dtype, large=large)
    sq_norms = reference.product_sq_norms(left, right, N_RECORDS)
    assert sq_norms.dtype == torch.float64
    for computed, product in zip(sq_norms.sum(1), products_as_clipped(left, right), strict=True):
        exact = exact_sq_norm(product)
        assert abs(Fraction(computed.item()) - exact) <= LEFT * RIGHT * Fraction(2) ** -53 * exact


@every_kind
def test_the_weighted_product_is_the_weighted_sum_of_finished_products(kind):
    left, right = factors(kind)
    weights = torch.rand(N_RECORDS, generator=torch.Generator().manual_seed(1))
    keep = torch.arange(N_RECORDS) != 2
    total = reference.weighted_product(left, right, weights, keep)
    assert total.dtype == torch.float64 and total.shape == (LEFT, RIGHT)
    terms = (weights * keep).double()[:, None, None] * products_as_clipped(left, right)
    assert ((total - terms.sum(0)).abs() <= 2 * N_RECORDS * 2.0**-53 * terms.abs().sum(0)).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38], ids=str)
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_a_record_that_is_not_kept_changes_no_bit_of_the_others(slot, garbage):
    left, right = factors()
    weights, keep = torch.linspace(0.1, 1, N_RECORDS), torch.arange(N_RECORDS) != slot
    zeros = left.clone()
    left[4 * slot + 1], zeros[4 * slot : 4 * slot + 4] = garbage, 0
    total = reference.weighted_product(left, right, weights, keep)
    assert torch.equal(total, reference.weighted_product(zeros, right, weights, ALL))


def clipped_sum(left, right, keep, max_grad_norm, loss_scale):
    """The clipped sum of one weight without a slab, as ``clipping.Product`` takes it."""
    sq_norms = reference.product_sq_norms(left, right, len(keep)).sum(1) * loss_scale**2
    weights = loss_scale * reference.clip_factors(sq_norms, max_grad_norm)
    return reference.weighted_product(left, right, weights, keep & sq_norms.isfinite())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_a_bad_record_adds_nothing_to_the_clipped_sum(slot, bad):
    left, right = factors()
    zeros = left.clone()
    left[4 * slot + 1], zeros[4 * slot : 4 * slot + 4] = bad, 0
    right[4 * slot + 1] = 2.0  # 2 * 3e38 overflows
    total = clipped_sum(left, right, ALL, 0.5, 1.0)
    assert torch.equal(total, clipped_sum(zeros, right, ALL, 0.5, 1.0))


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, 0.3])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1.0])
@every_kind
@every_dtype
def test_a_clipped_record_contributes_at_most_the_bound(dtype, kind, max_grad_norm, loss_scale):
    left, right = factors(kind, dtype=dtype, large=1e3 if dtype == torch.float16 else 1e6)
    limit = Fraction(max_grad_norm) ** 2
    for slot in torch.eye(N_RECORDS, dtype=torch.bool):
        total = clipped_sum(left, right, slot, max_grad_norm, loss_scale)
        sq_norm = exact_sq_norm(total)
        assert sq_norm <= limit
        product = products_as_clipped(left, right)[slot][0]
        if exact_sq_norm(product) * Fraction(loss_scale) ** 2 > limit:
            # Four float32 steps below the bound at most.
            assert sq_norm >= limit * (1 - Fraction(2) ** -21) ** 2


def test_a_record_below_the_bound_is_not_changed():
    left, right = factors()
    total = clipped_sum(left, right, torch.arange(N_RECORDS) == 1, 1e9, 8.0)
    assert torch.equal(total, 8.0 * products_as_clipped(left, right)[1])


@every_kind
def test_records_are_clipped_one_by_one(kind):
    left, right = factors(kind)
    alone = torch.zeros(LEFT, RIGHT, dtype=torch.float64)
    for own in zip(left.chunk(N_RECORDS), right.chunk(N_RECORDS), strict=True):
        alone += clipped_sum(*own, ALL[:1], 0.5, 4.0)
    assert torch.equal(clipped_sum(left, right, ALL, 0.5, 4.0), alone)


def test_no_records_have_a_product_of_zero():
    left, right, none = torch.ones(0, 7, LEFT), torch.ones(0, 7, RIGHT), ALL[:0]
    for total in (
        reference.weighted_product(left, right, torch.ones(0), none),
        clipped_sum(left, right, none, 1.0, 1.0),
    ):
        assert torch.equal(total, torch.zeros(LEFT, RIGHT, dtype=torch.float64))
    assert reference.product_sq_norms(left, right, 0).sum(1).shape == (0,)


def test_no_kept_records_have_a_product_of_zero():
    left, right = factors()
    assert (reference.weighted_product(left, right, torch.ones(N_RECORDS), ~ALL) == 0).all()
    assert (clipped_sum(left, right, ~ALL, 1.0, 1.0) == 0).all()
