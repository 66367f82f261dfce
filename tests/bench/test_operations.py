"""Operations beside each other: wrong results are seen, and shares are of the slower limit."""

import pytest
import torch

from bench import layers, operations
from bench.counting import count_flops
from bench.operations import COPY, OPACUS, OURS, PRODUCT, Operation
from bench.shapes import Shape
from bench.turns import Turns

SHAPE = Shape(3, 2, 9, 12, 20, 4)


@pytest.mark.parametrize("op", layers.USED)
def test_opacus_formula_gives_what_we_give(op):
    operation = operations.of_layer(op, SHAPE)
    verdicts = operations.examine(operation, upper_bound=op == "gram_sq_norms")
    assert set(verdicts) == {OURS, OPACUS}
    assert not any("wrong" in verdict for verdict in verdicts.values()), verdicts


def test_a_float32_norm_of_a_large_gradient_is_right():
    """1,638,400 squares are added, more than a product has terms."""
    large = Shape(1, 1, 4, 1280, 1280, 4)
    assert layers.summands_of("product_sq_norms", large) == 1280**2
    verdicts = operations.examine(operations.of_layer("product_sq_norms", large))
    assert not any("wrong" in verdict for verdict in verdicts.values()), verdicts
    assert {verdict["tolerance"] for verdict in verdicts.values()} == {1280 * 2.0**-24}


@pytest.mark.parametrize("op", operations.SLAB_OPS)
def test_norms_and_sums_of_a_slab_agree(op):
    verdicts = operations.examine(operations.of_slab(op, 5, 300))
    assert not any("wrong" in verdict for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize("op", operations.SLAB_OPS)
@pytest.mark.parametrize("impl", [OURS, OPACUS])
def test_a_long_slab_that_is_off_by_a_thousandth_is_wrong(op, impl):
    right = operations.of_slab(op, 2, 797_184)

    def results(of, dtype):
        found = right.results(of, dtype)
        off = of == impl and dtype == torch.float32
        return {n: t * (1 + 1e-3) for n, t in found.items()} if off else found

    verdicts = operations.examine(Operation(right.calls, results, 1, 1, right.allowed))
    assert [name for name, verdict in verdicts.items() if "wrong" in verdict] == [impl]


def test_some_records_of_a_slab_are_clipped_and_some_are_not():
    slab = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).double()
    norms, bound = slab.norm(dim=1), 300**0.5
    assert norms.min() < bound < norms.max()
    expected = ((bound / norms).clamp(max=1)[:, None] * slab).sum(0)
    found = operations.of_slab("clip_and_sum", 5, 300).results(OURS, torch.float64)["sum"]
    # Our factors are below C / norm by 2⁻²² and a rounding.
    assert (found - expected).norm() <= 2**-21 * expected.norm()


@pytest.mark.parametrize("impl", [OURS, OPACUS])
@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5])
def test_a_result_that_is_off_is_wrong(factor, impl):
    """Also ours on a CPU, where it is the specification itself, but in float32."""
    right = operations.of_layer("bias_per_record_grads", SHAPE)

    def results(of, dtype):
        found = right.results(of, dtype)
        off = of == impl and dtype == torch.float32
        return {n: t * factor for n, t in found.items()} if off else found

    verdicts = operations.examine(Operation(right.calls, results, 1, 1, right.allowed))
    assert [name for name, verdict in verdicts.items() if "wrong" in verdict] == [impl]


@pytest.mark.parametrize("wrong", [OURS, OPACUS])
def test_two_formulas_that_disagree_are_an_error(wrong):
    """On a CPU ours is its own yardstick: only the other formula can show that it is wrong."""
    right = operations.of_layer("bias_per_record_grads", SHAPE)

    def results(impl, dtype):
        found = right.results(impl, dtype)
        return {n: 2 * t for n, t in found.items()} if impl == wrong else found

    with pytest.raises(AssertionError, match="apart"):
        operations.examine(Operation(right.calls, results, 1, 1, right.allowed))


def test_a_bound_below_the_norm_is_wrong():
    right = operations.of_layer("gram_sq_norms", SHAPE)

    def results(impl, dtype):
        found = right.results(impl, dtype)
        low = impl == OURS and dtype == torch.float32
        return {"norms": found["norms"] * 0.9999} if low else found

    low = Operation(right.calls, results, 1, 1, right.allowed)
    assert operations.examine(low, upper_bound=True)[OURS]["wrong"]
    assert "wrong" not in operations.examine(right, upper_bound=True)[OURS]


PRODUCTS = (
    *("lora_forward", "lora_side_b", "lora_side_a", "per_record_product"),
    *("product_sq_norms", "weighted_product", "gram_sq_norms"),
)


@pytest.mark.parametrize("op", PRODUCTS)
def test_arithmetic_is_that_of_the_products(op):
    """As the counter sees Opacus' formula, which makes each product once."""
    inputs = layers.make_inputs(op, SHAPE, torch.float32, "cpu")
    counted = count_flops(lambda: layers.caller(op, "opacus")(inputs))
    # The weighted sum over N gradients is a product too, for an engine that has kept them, and so
    # is the norm that it takes of two Gram matrices.
    kept = {"gram_sq_norms": 18**2}
    assert layers.flops_of(op, SHAPE) == counted - 2 * SHAPE.n_records * kept.get(op, 0)


def test_what_float32_may_misplace_is_the_smaller_of_two_bounds():
    assert operations.rounding(10_000, 1_000_000) == 800 * 2.0**-24
    assert operations.rounding(10_000, 500) == 500 * 2.0**-24


READS = {
    "lora_forward": ("y", "x", "lora_a", "lora_b"),
    "lora_side_b": ("g", "h", "lora_b"),
    "lora_side_a": ("x", "h", "lora_a", "dx"),
    "lora_conv_side_a": ("images", "pixel_grads"),
    "per_record_product": ("g", "x"),
    "product_sq_norms": ("g", "x"),
    "weighted_product": ("g", "x"),
    "gram_sq_norms": ("g", "x"),
    "embedding_per_record_grads": ("g", "ids"),
    "bias_per_record_grads": ("g",),
    "scale_per_record_grads": ("g", "y"),
}


@pytest.mark.parametrize("op", layers.USED)
def test_bytes_are_those_of_what_is_read_and_of_what_is_returned(op):
    inputs = layers.make_inputs(op, SHAPE, torch.float32, "cpu")
    read = sum(inputs[name].nbytes for name in READS[op])
    returned = dict(zip(layers.OUTPUTS[op], layers.caller(op, "eager")(inputs), strict=True))
    written = sum(tensor.nbytes for name, tensor in returned.items() if name != "norms")
    # The forward pass keeps h for the backward pass.
    kept = inputs["h"].nbytes if op == "lora_forward" else 0
    assert layers.bytes_of(op, inputs) == read + written + kept


def test_the_share_is_of_the_slower_limit():
    timed = Turns({name: None for name in (OURS, OPACUS, COPY, PRODUCT)})
    timed.seconds = {
        **{OURS: [8.0, 10.0, 8.0], OPACUS: [16.0, 20.0, 16.0]},
        **{COPY: [1.0, 1.0, 1.0], PRODUCT: [4.0, 5.0, 4.0]},
    }
    flops = 2 * operations._SIDE**3
    of_one = Operation({}, None, bytes_moved=8, flops=flops, allowed=1)
    found = operations.compared(of_one, timed, n_calls=1, n_products=1)
    assert found["bound_by"] == "arithmetic"
    assert found["share_of_roofline"][OURS]["median"] == pytest.approx(0.5)
    assert found["over_ours"][OPACUS]["median"] == 2
    by_copy = operations.compared(
        Operation({}, None, bytes_moved=8, flops=flops // 100, allowed=1), timed, 1, 1
    )
    assert by_copy["bound_by"] == "bytes"
    assert by_copy["share_of_roofline"][OURS]["median"] == pytest.approx(0.125)
    # A turn of two calls does twice the arithmetic; its copies are in the turn already.
    two = operations.compared(of_one, timed, n_calls=2, n_products=1)
    assert two["share_of_roofline"][OURS]["median"] == pytest.approx(1)
    # And a turn of four products took four times as long as one would have.
    four = operations.compared(of_one, timed, n_calls=2, n_products=4)
    assert four["share_of_roofline"][OURS]["median"] == pytest.approx(1 / 4)
    assert two["median_us"][OURS] == pytest.approx(8e6 / 2)
