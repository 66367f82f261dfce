"""Gram norms are upper bounds of the squared norms of the products as they are clipped."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.kernels import ops, reference

LEFT, RIGHT, N_RECORDS = 6, 9, 5
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
ALL = torch.ones(N_RECORDS, dtype=torch.bool)
SCALES = {"ordinary": 1.0, "small": 1e-18, "subnormal": 1e-22, "huge": 1e14}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_seed = pytest.mark.parametrize("seed", range(5), ids="seed={}".format)


def factors(draws=4, tokens=(7,), dtype=torch.float32, seed=0, cancel=None):
    """left and right; with ``cancel`` two draws are opposite and that much larger."""
    generator = torch.Generator().manual_seed(seed)
    rows = (N_RECORDS * draws, *tokens)
    left = torch.randn(*rows, LEFT, generator=generator)
    right = torch.randn(*rows, RIGHT, generator=generator)
    if cancel is not None:
        left[0::draws] *= cancel
        left[1::draws], right[1::draws] = -left[0::draws], right[0::draws]
    return left.to(dtype), right.to(dtype)


def products_as_clipped(left, right):
    slots, ones = torch.eye(N_RECORDS, dtype=torch.bool), torch.ones(N_RECORDS)
    return torch.stack([reference.weighted_product(left, right, ones, own) for own in slots])


def exact_sq_norm(values):
    return sum((Fraction(v) ** 2 for v in values.flatten().tolist()), Fraction(0))


def row_products(left, right):
    """``B = Σ_t ‖l_t‖ ‖r_t‖`` of each record."""
    rows = left.double().norm(dim=-1) * right.double().norm(dim=-1)
    return rows.reshape(N_RECORDS, -1).sum(1)


def assert_upper_bounds(left, right):
    bounds = reference.gram_sq_norms(left, right, N_RECORDS)
    assert bounds.dtype == torch.float64 and bounds.shape == (N_RECORDS, 1)
    for bound, product in zip(bounds.sum(1), products_as_clipped(left, right), strict=True):
        assert Fraction(bound.item()) >= exact_sq_norm(product)


@pytest.mark.parametrize("tokens", [(), (7,), (3, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
@every_dtype
def test_gram_norms_bound_ordinary_products(dtype, draws, tokens):
    assert_upper_bounds(*factors(draws, tokens, dtype))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gram_norms_bound_products_of_any_scale(dtype, scale):
    left, right = factors()
    assert_upper_bounds((scale * left).to(dtype), (scale * right).to(dtype))


@every_seed
@pytest.mark.parametrize("rest", [1.0, 0.0], ids=["rest", "no rest"])
@every_dtype
def test_gram_norms_bound_what_is_left_of_draws_that_cancel(dtype, rest, seed):
    left, right = factors(dtype=dtype, seed=seed, cancel=1e3 if dtype == torch.float16 else 1e6)
    left[2::4] *= rest
    left[3::4] *= rest
    assert_upper_bounds(left, right)


@every_seed
def test_gram_norms_bound_the_residue_of_rows_that_cancel_in_exact_arithmetic(seed):
    """Rows l and a split of -l: the exact product is small and the computed one is rounding."""
    left, right = factors(1, (64,), seed=seed)
    left[:, 32:] = -left[:, :32] * 1e6
    left[:, :32] *= 1e6
    right[:, 32:] = right[:, :32]
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    left, right = left[:, shuffled], right[:, shuffled]
    exact = left.double().mT @ right.double()
    residue = products_as_clipped(left, right)
    assert (residue.norm(dim=(1, 2)) > 1e3 * exact.norm(dim=(1, 2))).all()
    assert_upper_bounds(left, right)


@every_seed
@every_dtype
def test_gram_norms_exceed_the_norm_by_a_few_times_the_rounding_of_the_product(dtype, seed):
    left, right = factors(dtype=dtype, seed=seed)
    compute = torch.promote_types(dtype, torch.float32)
    norms = products_as_clipped(left, right).norm(dim=(1, 2))
    excess = reference.gram_sq_norms(left, right, N_RECORDS).sum(1).sqrt() - norms
    size = row_products(left, right)
    # Four roundoffs for each of the 28 rows and two more, twice that to spare; the error of the
    # float64 Gram sum is that of 28² terms and two dot products, squared under the root.
    gram_error = 2 * torch.finfo(torch.float64).eps * (LEFT + RIGHT + 28**2)
    allowed = 8 * 30 * torch.finfo(compute).eps / 2 * size + gram_error * size.square() / norms
    assert (excess <= allowed).all()


@every_seed
def test_clipping_by_gram_norms_keeps_every_contribution_within_the_bound(seed):
    left, right = factors(seed=seed, cancel=1e6)
    sq_norms = reference.gram_sq_norms(left, right, N_RECORDS).sum(1)
    weights = reference.clip_factors(sq_norms, 0.5)
    for slot in torch.eye(N_RECORDS, dtype=torch.bool):
        total = reference.weighted_product(left, right, weights, slot)
        assert exact_sq_norm(total) <= Fraction(1, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("other", [1.0, 0.0], ids=["times one", "times zero"])
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_the_gram_norm_of_a_bad_record_alone_is_not_finite(side, other, bad):
    pair = factors()
    pair[side][9, 3, 2] = bad
    pair[1 - side][9, 3] *= other
    finite = reference.gram_sq_norms(*pair, N_RECORDS).sum(1).isfinite()
    assert finite.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gram_norm_of_a_record_whose_product_overflows_is_not_finite(dtype, cancel):
    left, right = factors(dtype=dtype)
    left[8] = right[8] = 1e20
    if cancel:
        left[9], right[9] = -1e20, 1e20
    assert not products_as_clipped(left, right)[2].isfinite().all()
    finite = reference.gram_sq_norms(left, right, N_RECORDS).sum(1).isfinite()
    assert finite.tolist() == [True, True, False, True, True]


def test_gram_norms_of_no_records():
    left, right = torch.ones(0, 7, LEFT), torch.ones(0, 7, RIGHT)
    assert reference.gram_sq_norms(left, right, 0).sum(1).shape == (0,)


def upper_bound(gram, size, n_rows, features, compute=torch.float32):
    """The bound for one record whose rows have norms of one in the mean."""
    row_norms = torch.tensor([[size, n_rows, n_rows]], dtype=torch.float64)
    gram = torch.tensor([gram], dtype=torch.float64)
    return reference.gram_upper_bound(gram, row_norms, n_rows, features, torch.float32, compute)


@given(
    size=st.floats(1e-6, 1e6),
    share=st.floats(0, 1),
    features=st.integers(2, 100_000),
    low=st.floats(-1, 1),
    n_rows=st.integers(1, 2**12),
    compute=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=100)
def test_the_upper_bound_covers_a_low_gram_sum_and_the_rounding_of_truncating_hardware(
    size, share, features, low, n_rows, compute
):
    """True norm ``share · B``, a Gram sum off by up to ``e B²``, a product off by ``m ε B``."""
    with mpmath.workprec(200):
        b, e = mpmath.mpf(size), 4 * mpmath.mpf(2) ** -24 * features
        true = (mpmath.mpf(share) * b) ** 2
        gram = float(true + mpmath.mpf(low) * e * b**2)
        epsilon = mpmath.mpf(4) * torch.finfo(compute).eps / 2
        worst = (mpmath.sqrt(true) + n_rows * epsilon * b) ** 2
        bound = upper_bound(gram, size, n_rows, features, compute)
        assert bound.dtype == torch.float64
        # The formula's own float64 arithmetic: at most ten roundings.
        assert mpmath.mpf(bound.item()) >= worst * (1 - mpmath.mpf(10) * 2**-53)


@pytest.mark.parametrize("gram", [-1.0, -0.0, 0.0])
def test_a_gram_sum_that_is_not_positive_counts_as_zero(gram):
    assert upper_bound(gram, 1.0, 7, 9) == upper_bound(0.0, 1.0, 7, 9) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_bound_of_values_that_are_not_finite_is_not_finite(bad):
    assert upper_bound(1.0, 1.0, 7, 9).isfinite()
    assert not upper_bound(bad, 1.0, 7, 9).isfinite()
    assert not upper_bound(1.0, bad, 7, 9).isfinite()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@IMPLS
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-18])
@pytest.mark.parametrize("cancel", [False, True])
def test_the_bound_holds_for_both_implementations(impl, scale, cancel):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(8, 9, f, generator=generator).to(DEVICE) for f in (40, 20))
    if cancel:
        left[1::2], right[1::2] = -left[0::2], right[0::2]
    left = left * scale
    bound = ops.gram_sq_norms(left, right, n_records=4, impl=impl).sum(1).sqrt()
    weights = torch.eye(4, dtype=torch.float64, device=DEVICE)
    for n in range(4):
        one = ops.weighted_product(
            left, right, weights[n], weights[n].bool(), n_records=4, impl=impl
        )
        assert one.norm() <= bound[n]
        if not cancel and scale > 1e-10:
            assert bound[n] <= one.norm() * 1.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@IMPLS
def test_rows_whose_products_underflow_are_not_taken_for_zero(impl):
    """Tiny left rows beside huge right ones: every float32 Gram entry of the left is 0."""
    left = torch.full((1, 128, 256), 2.5e-23, device=DEVICE)
    right = torch.full((1, 128, 16), 4e18, device=DEVICE)
    bound = ops.gram_sq_norms(left, right, n_records=1, impl=impl).sum().sqrt()
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    product = ops.weighted_product(left, right, one, one.bool(), n_records=1, impl=impl)
    assert 0 < product.norm() <= bound
