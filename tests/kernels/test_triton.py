"""The Triton ops against their specification: in the interpreter, or on a GPU where there is one.

Accuracy, repeatability and unwritten outputs are checked by `bench.cases.check`.
"""

import pytest
import torch

from bench import cases
from bench.shapes import SMALL
from dpengine.kernels import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOW = {
    ("embedding", "many_rows"),
    ("embedding", "many_draws"),
    ("gram_sq_norms", "many_rows"),
}  # for the interpreter
RARE = {  # seconds each, and the op has other shapes
    ("gram_sq_norms", "many_draws"),
    ("embedding", "rank_17"),
    ("lora_conv_side_a", "one_token"),
}
CASES = [
    pytest.param(op, shape, marks=[pytest.mark.slow] * ((op, shape) in RARE and DEVICE == "cpu"))
    for op in cases.OPS
    for shape in SMALL
    if (op, shape) not in SLOW or DEVICE != "cpu"
]


def problems(op, shape, dtype, strided=False):
    return cases.check(op, cases.make_inputs(SMALL[shape], dtype, DEVICE, strided=strided))


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_a_kernel_is_at_most_twice_as_wrong_as_eager_pytorch(op, shape):
    assert problems(op, shape, torch.float32) == []


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", cases.OPS)
def test_narrow_types_lose_no_more_than_eager_pytorch(op, dtype):
    assert problems(op, "odd", DTYPES[dtype]) == []


@pytest.mark.parametrize("op", cases.OPS)
def test_strided_inputs_are_read_where_they_lie(op):
    assert problems(op, "odd", torch.float32, strided=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_shape_and_type_with_strided_inputs(op, shape, dtype):
    if (op, shape) not in SLOW or DEVICE != "cpu":
        assert problems(op, shape, DTYPES[dtype], strided=True) == []


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_a_captured_graph_draws_other_noise_when_its_stream_is_overwritten():
    inputs = small_inputs()
    noise = [ops.add_noise(inputs.values, inputs.stream, noise_stddev=1.0, divisor=1.0)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise.append(ops.add_noise(inputs.values, inputs.stream, noise_stddev=1.0, divisor=1.0))
    graph.replay()
    assert torch.equal(noise[0], noise[1])
    inputs.stream[9] += 1
    graph.replay()
    assert not torch.isin(noise[1], noise[0]).any()


def small_inputs(dtype=torch.float32, shape="odd"):
    return cases.make_inputs(SMALL[shape], dtype, DEVICE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38], ids=str)
def test_a_bad_record_changes_no_bit_of_the_others(bad):
    inputs = small_inputs()
    keep = torch.ones_like(inputs.keep)

    def clipped_sum(slab):
        sq_norms = ops.sq_norms([slab], impl="triton")
        return ops.clip_and_sum([slab], sq_norms, keep, max_grad_norm=1.0, impl="triton")

    zero, dirty = inputs.slab.clone(), inputs.slab.clone()
    zero[1] = 0
    dirty[1, -1] = bad
    if bad == 3e38:  # finite, of a finite norm, and clipped like any other
        total = clipped_sum(dirty) - clipped_sum(zero)
        assert 1 - 2**-20 < total.norm() <= 1
    else:
        assert torch.equal(clipped_sum(dirty), clipped_sum(zero))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_record_leaves_products_alone(bad):
    def run(value):
        inputs = small_inputs()
        draws = inputs.shape.draws
        inputs.x[draws : 2 * draws] = value
        inputs.keep[:] = torch.tensor([True, False, True], device=DEVICE)
        return cases.OPS["weighted_product"](inputs, "triton")["sum"]

    assert torch.equal(run(bad), run(0.0))


def test_what_weighted_product_clips_has_the_norm_that_product_sq_norms_found():
    # Draws that cancel but for rounding: a norm of anything else would be far off.
    inputs = small_inputs(shape="one_record")
    inputs.g[1], inputs.x[1] = -inputs.g[0], inputs.x[0]
    inputs.g[3], inputs.x[3] = -inputs.g[2], inputs.x[2]
    inputs.g.mul_(1e6)
    sq_norm = ops.product_sq_norms(inputs.g, inputs.x, n_records=1, impl="triton").sum()
    one = torch.ones(1, device=DEVICE, dtype=torch.float64)
    product = ops.weighted_product(inputs.g, inputs.x, one, one.bool(), n_records=1, impl="triton")
    assert sq_norm > 0
    torch.testing.assert_close(product.square().sum(), sq_norm, rtol=1e-13, atol=0)


@pytest.mark.parametrize("op", ["per_record_product", "lora_side_b"])
def test_gradients_go_where_out_lies_in_a_slab_and_nowhere_else(op):
    inputs = small_inputs()
    n, o, r = inputs.shape.n_records, inputs.shape.out_features, inputs.shape.rank
    slab = torch.full((n, 11 + o * r + 7), torch.nan, device=DEVICE)
    out = slab[:, 11 : 11 + o * r].view(n, o, r)
    if op == "lora_side_b":
        grad = ops.lora_side_b(
            inputs.g, inputs.h, inputs.lora_b, scaling=1.0, n_records=n, out=out, impl="triton"
        )[1]
        expected = ops.per_record_product(inputs.g, inputs.h, n_records=n, impl="reference")
    else:
        grad = ops.per_record_product(inputs.g, inputs.h, n_records=n, out=out, impl="triton")
        expected = ops.per_record_product(inputs.g, inputs.h, n_records=n, impl="reference")
    assert grad.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected)
    assert slab[:, :11].isnan().all() and slab[:, 11 + o * r :].isnan().all()


def test_adapters_that_share_their_input_go_in_one_pass():
    inputs, other = small_inputs(), cases.make_inputs(SMALL["odd"], torch.float32, DEVICE, seed=1)
    n, rank = inputs.shape.n_records, inputs.shape.rank
    together = inputs.dx.clone()
    grads = ops.lora_side_a(
        inputs.x,
        torch.cat([inputs.u, other.u], -1),
        torch.cat([inputs.lora_a, other.lora_a]),
        n_records=n,
        input_grad=together,
        impl="triton",
    )
    apart = inputs.dx.clone()
    for part, grad in ((inputs, grads[:, :rank]), (other, grads[:, rank:])):
        expected = ops.lora_side_a(
            inputs.x, part.u, part.lora_a, n_records=n, input_grad=apart, impl="reference"
        )
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(together, apart)


GAMMAS = [None, 0.01, *(pytest.param(g, marks=pytest.mark.slow) for g in (1e-300, 1e20))]
BOUNDS = [1.0, 1e-44, *(pytest.param(c, marks=pytest.mark.slow) for c in (0.1, 1e-30, 1e30))]


@pytest.mark.parametrize("gamma", GAMMAS, ids="gamma={}".format)
@pytest.mark.parametrize("bound", BOUNDS)
def test_clip_factors_are_those_of_the_specification_bit_for_bit(bound, gamma):
    # The gradients are the rows of the identity: the sum holds the factors.
    sq_norms = torch.cat([torch.logspace(-30, 30, 500), torch.linspace(0.99, 1.01, 500)]).double()
    sq_norms = torch.cat([sq_norms, torch.tensor([0.0, 1e-300, 1.0]).double()]).to(DEVICE)
    expected = ops.clip_factors(sq_norms, bound, gamma=gamma)
    keep = torch.ones(len(sq_norms), dtype=torch.bool, device=DEVICE)
    slab = torch.eye(len(sq_norms), device=DEVICE)
    total = ops.clip_and_sum(
        [slab], sq_norms, keep, max_grad_norm=bound, gamma=gamma, impl="triton"
    )
    assert torch.equal(total, expected)


def test_small_arguments_may_lie_apart_in_memory():
    inputs = small_inputs()
    n = inputs.shape.n_records
    apart = torch.stack([inputs.sq_norms, torch.zeros_like(inputs.sq_norms)], 1)[:, 0]
    everyone = torch.ones(1, dtype=torch.bool, device=DEVICE).expand(n)
    sums = [
        ops.clip_and_sum([inputs.slab], norms, keep, max_grad_norm=1.0, impl="triton")
        for norms, keep in ((apart, everyone), (inputs.sq_norms, torch.ones_like(inputs.keep)))
    ]
    assert torch.equal(*sums)
    apart = torch.stack([inputs.values, torch.zeros_like(inputs.values)], 1)[:, 0]
    noisy = [
        ops.add_noise(values, inputs.stream, noise_stddev=1.0, divisor=1.0, impl="triton")
        for values in (apart, inputs.values)
    ]
    assert torch.equal(*noisy)


@pytest.mark.parametrize("n_values", [1, 8, 1000, 1025, 4099])
def test_normals_agree_with_the_specification_to_four_units_in_the_last_place(n_values):
    stream = small_inputs().stream
    zeros = torch.zeros(n_values, dtype=torch.float64, device=DEVICE)
    ours, theirs = (
        ops.add_noise(zeros, stream, noise_stddev=1.0, divisor=1.0, impl=impl)
        for impl in ("triton", "reference")
    )
    # Near a zero of sine or cosine the angle's own rounding is larger than the value's.
    assert ((ours - theirs).abs() <= 4 * 2**-52 * theirs.abs().clamp(min=2**-4)).all()


@pytest.mark.parametrize("counter", [0, 2**31 - 2, 2**32 - 3], ids=hex)
def test_words_are_those_of_the_specification_bit_for_bit(counter):
    stream = small_inputs().stream
    stream[8] = counter - 2**32 if counter >= 2**31 else counter
    ours, theirs = (ops.chacha20_words(stream, 300, impl=i) for i in ("triton", "reference"))
    assert torch.equal(ours, theirs)


def test_words_are_those_of_rfc_8439_section_2_3_2():
    key = bytes(range(32))
    nonce = bytes.fromhex("000000090000004a00000000")
    state = torch.frombuffer(bytearray(key + b"\x01\0\0\0" + nonce), dtype=torch.int32)
    words = ops.chacha20_words(state.to(DEVICE), 1, impl="triton")
    assert words.cpu().numpy().tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_another_stream_gives_other_noise():
    def noise(stream):
        zeros = torch.zeros(100, dtype=torch.float64, device=DEVICE)
        return ops.add_noise(zeros, stream, noise_stddev=1.0, divisor=1.0, impl="triton")

    stream = small_inputs().stream
    first = noise(stream)
    stream[9] += 1
    assert not torch.isin(noise(stream), first).any()


def test_the_noise_of_many_programs_is_that_of_the_specification():
    """17,505 values are those of 18 programs of 1,024."""
    stream = small_inputs().stream
    zeros = torch.zeros(17_505, dtype=torch.float64, device=DEVICE)
    ours, theirs = (
        ops.add_noise(zeros, stream, noise_stddev=1.0, divisor=1.0, impl=impl)
        for impl in ("triton", "reference")
    )
    assert ((ours - theirs).abs() <= 4 * 2**-52 * theirs.abs().clamp(min=2**-4)).all()


def test_norms_and_clipped_sums_of_many_programs_are_of_all_columns_and_records():
    """70 blocks of 4,096 columns, and more records than are clipped at a time; all are whole."""
    n_columns = 70 * 4096 + 3
    slab = torch.zeros(3, n_columns, device=DEVICE)
    slab[0, -3:] = torch.tensor([6.0, 2.0, 3.0])
    slab[1, -1] = torch.nan
    slab[2, 65 * 4096] = 8.0
    sq_norms = ops.sq_norms([slab], impl="triton")
    assert sq_norms.tolist()[::2] == [49.0, 64.0] and not sq_norms[1].isfinite()
    keep = torch.tensor([True, True, True], device=DEVICE)
    total = ops.clip_and_sum([slab], sq_norms, keep, max_grad_norm=0.7, impl="triton")
    assert total[-3:].tolist() == pytest.approx([0.6, 0.2, 0.3], rel=1e-6)
    assert float(total[65 * 4096]) == pytest.approx(0.7, rel=1e-6)
    assert total.count_nonzero() == 4

    many = torch.ones(200, 5, device=DEVICE)
    keep = torch.arange(200, device=DEVICE) < 199
    total = ops.clip_and_sum([many], many.sum(1).double(), keep, max_grad_norm=9.0, impl="triton")
    assert total.tolist() == [199.0] * 5
