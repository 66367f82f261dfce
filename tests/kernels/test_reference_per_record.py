"""What every rule for per-record gradients promises: slots, slabs, rounding, squared norms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dpengine.kernels import reference

TOKENS, IN, OUT, RANK, VOCABULARY = 7, 12, 6, 3, 6
STRIDE, PADDING, DILATION = (2, 1), (1, 0), (1, 2)
LORA_A = torch.randn(RANK, IN, generator=torch.Generator().manual_seed(1))
LORA_B = torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(2))
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {"fp32": torch.float32, "fp64": torch.float64, **NARROW}


@dataclass(frozen=True)
class Rule:
    """``call(first, second, n_records, out)`` -> gradient."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    gradient: tuple[int, ...]
    call: Callable[..., Tensor]

    def inputs(self, n_rows: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            scale * torch.randn(n_rows, *shape, generator=generator)
            for shape in (self.first, self.second)
        )


def side_b(g, h, n, out=None):
    return reference.lora_side_b(g, h, LORA_B, 0.7, n, out)[1]


def side_a(x, u, n, out=None):
    return reference.lora_side_a(x, u, LORA_A, n, torch.zeros_like(x), out)


def conv_side_a(x, u, n, out=None):
    return reference.lora_conv_side_a(x, u, (2, 3), STRIDE, PADDING, DILATION, n, out)


def embedding(g, ids, n, out=None):
    ids = ids[..., 0].abs().mul(8).long() % VOCABULARY
    return reference.embedding_per_record_grads(ids, g, VOCABULARY, n, 3, out)


def bias(g, _, n, out=None):
    return reference.bias_per_record_grads(g, n, out)


RULES = {
    "side_b": Rule((TOKENS, OUT), (TOKENS, RANK), (OUT, RANK), side_b),
    "side_a": Rule((TOKENS, IN), (TOKENS, RANK), (RANK, IN), side_a),
    "conv_side_a": Rule((4, 8, 7), (RANK, 5, 3), (RANK, 4, 2, 3), conv_side_a),
    "product": Rule((TOKENS, OUT), (TOKENS, IN), (OUT, IN), reference.per_record_product),
    "embedding": Rule((TOKENS, OUT), (TOKENS, 1), (VOCABULARY, OUT), embedding),
    "bias": Rule((TOKENS, OUT), (), (OUT,), bias),
    "scale": Rule((TOKENS, OUT), (TOKENS, OUT), (OUT,), reference.scale_per_record_grads),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_draws = pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)


def exact_sq_norm(values: Tensor) -> Fraction:
    return sum((Fraction(v) ** 2 for v in values.flatten().tolist()), Fraction(0))


def assert_sq_norms_of_stored_values(grad, sq_norms):
    assert sq_norms.dtype == torch.float64
    for values, sq_norm in zip(grad, sq_norms.tolist(), strict=True):
        exact = exact_sq_norm(values)
        assert exact > 0
        assert abs(Fraction(sq_norm) - exact) <= values.numel() * Fraction(2) ** -53 * exact


def slab_and_view(rule, n_records, dtype):
    """A slab [N, P] of sevens and the view of one parameter between its neighbours."""
    size = math.prod(rule.gradient)
    slab = torch.full((n_records, 4 + size + 9), 7.0, dtype=dtype)
    return slab, slab[:, 4 : 4 + size].view(n_records, *rule.gradient)


@every_draws
@every_rule
def test_a_record_has_the_same_bits_in_every_slot_and_beside_any_neighbours(rule, draws):
    n_slots, seen = 7, []
    record = rule.inputs(draws)
    for slot in range(n_slots):
        rows = rule.inputs(n_slots * draws, seed=slot + 1, scale=10.0 ** (slot - 3))
        for tensor, own in zip(rows, record, strict=True):
            tensor[slot * draws : (slot + 1) * draws] = own
        grad = rule.call(*rows, n_slots)
        seen.append((grad[slot].clone(), reference.sq_norms([grad])[slot].clone()))
    for bits in seen[1:]:
        assert all(map(torch.equal, bits, seen[0]))


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@every_rule
def test_the_gradient_is_rounded_to_the_slab_and_its_neighbours_are_left_alone(rule, dtype):
    rows = rule.inputs(6)
    slab, view = slab_and_view(rule, 3, dtype)
    grad = rule.call(*rows, 3, out=view)
    alone = rule.call(*rows, 3)
    assert torch.equal(view, alone.to(dtype)) and torch.equal(grad, view)
    size = math.prod(rule.gradient)
    assert (slab[:, :4] == 7).all() and (slab[:, 4 + size :] == 7).all()


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@every_rule
def test_squared_norms_are_those_of_the_values_as_stored(rule, dtype):
    _, view = slab_and_view(rule, 3, dtype)
    grad = rule.call(*rule.inputs(6), 3, out=view)
    assert_sq_norms_of_stored_values(view, reference.sq_norms([grad]))


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@every_rule
def test_without_a_slab_the_gradient_keeps_the_type_it_was_accumulated_in(rule, dtype):
    grad = rule.call(*(rows.to(dtype) for rows in rule.inputs(6)), 3)
    assert grad.shape == (3, *rule.gradient)
    assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_sq_norms_of_stored_values(grad, reference.sq_norms([grad]))


@every_rule
def test_a_gradient_that_overflows_the_slab_has_an_infinite_squared_norm(rule):
    # Sums of few ones, and a million times as much, which is beyond fp16.
    rows = [torch.ones(3, *shape) for shape in (rule.first, rule.second)]
    rows[0][1] *= 1e6
    _, view = slab_and_view(rule, 3, torch.float16)
    grad = rule.call(*rows, 3, out=view)
    assert reference.sq_norms([grad]).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@every_rule
def test_a_bad_value_makes_the_norm_of_its_record_alone_not_finite(rule, bad):
    rows = rule.inputs(6)
    rows[0][3].fill_(bad)
    grad = rule.call(*rows, 3)
    assert reference.sq_norms([grad]).isfinite().tolist() == [True, False, True]


@every_rule
def test_strided_inputs_give_the_gradients_of_contiguous_ones(rule):
    rows = rule.inputs(6)
    strided = [torch.stack([r, r + 1], -1)[..., 0] for r in rows]
    assert not strided[0].is_contiguous()
    grad = rule.call(*strided, 3)
    expected = rule.call(*rows, 3)
    # Twice the worst rounding of one element: at most 4 * 15 terms (Higham, section 3.1).
    size = rule.call(rows[0].abs(), rows[1] if rule.call is embedding else rows[1].abs(), 3)
    assert ((grad - expected).abs() <= 2 * 61 * 2.0**-24 * size).all()


@pytest.mark.parametrize(("rank", "features"), [(1, 17), (3, 11), (5, 9), (17, 5), (3, 6)])
def test_a_product_of_odd_sizes_has_the_same_bits_in_every_slot(rank, features):
    n_slots, seen = 7, []
    rule = Rule((28, rank), (28, features), (rank, features), reference.per_record_product)
    record = rule.inputs(1)
    for slot in range(n_slots):
        rows = rule.inputs(n_slots, seed=slot + 1)
        for tensor, own in zip(rows, record, strict=True):
            tensor[slot] = own[0]
        seen.append(rule.call(*rows, n_slots)[slot].clone())
    assert all(torch.equal(bits, seen[0]) for bits in seen[1:])


NO_RECORDS = [pytest.param(rule, id=name) for name, rule in RULES.items()]


@pytest.mark.parametrize("rule", NO_RECORDS)
def test_no_records_have_no_gradients(rule):
    grad = rule.call(*rule.inputs(0), 0)
    sq_norms = reference.sq_norms([grad])
    assert grad.shape == (0, *rule.gradient)
    assert sq_norms.dtype == torch.float64 and sq_norms.shape == (0,)
