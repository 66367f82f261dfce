"""Where the kernels' inputs and outputs may lie: slabs, strides of single operands, split sums."""

from dataclasses import replace

import pytest
import torch

from bench import cases
from bench.shapes import SMALL
from dpengine.kernels import ops
from dpengine.kernels.gpu import launch, lora_conv, product, tiling

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = replace(SMALL["odd"], tokens=9)


def inputs(seed=0, **changes):
    return cases.make_inputs(replace(SHAPE, **changes), torch.float32, DEVICE, seed=seed)


def with_out(op, i, out, impl):
    n = i.shape.n_records
    if op == "lora_side_b":
        return ops.lora_side_b(i.g, i.h, i.lora_b, scaling=0.7, n_records=n, out=out, impl=impl)[1]
    if op == "lora_side_a":
        return ops.lora_side_a(i.x, i.u, i.lora_a, n_records=n, out=out, impl=impl)
    if op == "lora_conv_side_a":
        return ops.lora_conv_side_a(
            i.images, i.pixel_grads, **cases.CONV, n_records=n, out=out, impl=impl
        )
    if op == "embedding":
        return ops.embedding_per_record_grads(
            i.ids, i.g, num_embeddings=6, n_records=n, padding_idx=-4, out=out, impl=impl
        )
    if op == "bias":
        return ops.bias_per_record_grads(i.g, n_records=n, out=out, impl=impl)
    return ops.scale_per_record_grads(i.x, i.dx, n_records=n, out=out, impl=impl)


@pytest.mark.parametrize("tokens", [9, 300], ids=["whole", "split"])
@pytest.mark.parametrize(
    "op", ["lora_side_b", "lora_side_a", "lora_conv_side_a", "embedding", "bias", "scale"]
)
def test_gradients_are_rounded_into_a_narrow_slab_and_squared_as_stored(op, tokens):
    if op == "embedding" and tokens > 100 and DEVICE == "cpu":
        tokens = 40
    i = inputs(tokens=tokens)
    expected = with_out(op, i, None, "reference")
    size = expected[0].numel()
    slab = torch.full((len(expected), 5 + size + 3), torch.nan, device=DEVICE).bfloat16()
    out = slab[:, 5 : 5 + size].view(expected.shape)
    sq_norms = ops.sq_norms([with_out(op, i, out, "triton")], impl="triton")
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)
    stored = out.double().flatten(1).square().sum(1)
    assert ((sq_norms - stored).abs() <= size * 2.0**-52 * stored).all()
    assert slab[:, :5].isnan().all() and slab[:, 5 + size :].isnan().all()


@pytest.mark.parametrize("op", ["sq_norms", "clip_and_sum"])
def test_a_part_of_a_slab_is_read_alone(op):
    wide = torch.randn(5, 3000, device=DEVICE)
    part, keep = wide[:, 7:2500], torch.ones(5, dtype=torch.bool, device=DEVICE)

    def run(grads):
        norms = ops.sq_norms([grads], impl="triton")
        if op == "sq_norms":
            return norms
        return ops.clip_and_sum([grads], norms, keep, max_grad_norm=1.0, impl="triton")

    assert torch.equal(run(part), run(part.clone()))


def apart(tensor):
    """The same values with rows and tokens interleaved, so that K·T rows are not evenly spaced."""
    return torch.empty_like(tensor.transpose(0, 1)).copy_(tensor.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("op", "operand"),
    [
        ("lora_forward", "x"),
        ("lora_side_b", "g"),
        ("lora_side_b", "h"),
        ("lora_side_a", "x"),
        ("lora_side_a", "u"),
        ("product_sq_norms", "g"),
        ("product_sq_norms", "x"),
        ("weighted_product", "g"),
        ("gram_sq_norms", "g"),
        ("gram_sq_norms", "x"),
        ("embedding", "ids"),
        ("embedding", "g"),
        ("scale", "x"),
        ("scale", "dx"),
    ],
)
def test_one_operand_may_lie_apart(op, operand):
    i = inputs()
    strided = replace(i, **{operand: apart(getattr(i, operand))})
    expected = cases.OPS[op](i, "triton")
    for name, value in cases.OPS[op](strided, "triton").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("op", ["lora_forward", "lora_side_b", "lora_side_a"])
def test_the_weights_may_be_transposed(op):
    i = inputs()
    transposed = replace(i, lora_a=i.lora_a.T.contiguous().T, lora_b=i.lora_b.T.contiguous().T)
    expected = cases.OPS[op](i, "triton")
    for name, value in cases.OPS[op](transposed, "triton").items():
        assert torch.equal(value, expected[name]), name


def test_small_tiles_split_a_product_in_every_direction():
    i = inputs()
    n, o, f = i.shape.n_records, i.shape.out_features, i.shape.in_features
    tile = tiling.Tiling(16, 16, 16, 16, 4, 1)
    grad = torch.full((n, o, f), torch.nan, device=DEVICE)
    launch.run(product.launches(i.g, i.x, grad, tile=tile))
    expected = ops.per_record_product(i.g, i.x, n_records=n, impl="reference")
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("strided", [False, True])
def test_small_tiles_split_a_convolution_in_every_direction(strided):
    i = inputs(rank=17, in_features=20)
    u = i.pixel_grads.transpose(2, 3).contiguous().transpose(2, 3) if strided else i.pixel_grads
    n, numbers = i.shape.n_records, (cases.CONV["stride"], cases.CONV["padding"])
    tile = tiling.Tiling(16, 16, 16, 16, 4, 1)
    grad = torch.full((n, 17, 20, *cases.CONV["kernel_size"]), torch.nan, device=DEVICE)
    launches = lora_conv.launches(i.images, u, *numbers, cases.CONV["dilation"], grad, tile=tile)
    launch.run(launches)
    expected = ops.lora_conv_side_a(
        i.images, i.pixel_grads, **cases.CONV, n_records=n, impl="reference"
    )
    torch.testing.assert_close(grad, expected)


def test_an_embedding_wider_than_a_tile_leaves_ids_out_of_range_alone():
    i = inputs(out_features=150)
    n, ids = i.shape.n_records, i.ids.clone()
    grad = ops.embedding_per_record_grads(ids, i.g, num_embeddings=6, n_records=n, impl="triton")
    expected = ops.embedding_per_record_grads(ids, i.g, num_embeddings=6, n_records=n)
    torch.testing.assert_close(grad, expected)
    ids[0, 0] = 6  # the first row of the next record, were it written
    beyond = ops.embedding_per_record_grads(ids, i.g, num_embeddings=6, n_records=n, impl="triton")
    assert torch.equal(beyond[1:], grad[1:])


def test_sums_over_records_keep_what_float32_would_lose():
    left = right = torch.ones(2, 1, 1, device=DEVICE)
    weights = torch.tensor([1.0, 2.0**-40], dtype=torch.float64, device=DEVICE)
    total = ops.weighted_product(left, right, weights, weights > 0, n_records=2, impl="triton")
    assert total.item() == 1 + 2.0**-40


@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("op", ["per_record_product", "product_sq_norms", "lora_side_b"])
def test_rows_may_have_any_number_of_token_dimensions(op, tokens):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(6, *tokens, f, generator=generator).to(DEVICE) for f in (20, 17))

    def run(impl):
        if op == "product_sq_norms":
            return ops.product_sq_norms(left, right, n_records=3, impl=impl).sum(1)
        if op == "per_record_product":
            return ops.per_record_product(left, right, n_records=3, impl=impl)
        lora_b = torch.ones(20, 17, device=DEVICE)
        return ops.lora_side_b(left, right, lora_b, scaling=0.7, n_records=3, impl=impl)[1]

    torch.testing.assert_close(run("triton"), run("reference"))


def test_several_tensors_are_one_gradient():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(5, *shape, generator=generator) for shape in ((3, 4), (), (7,))]
    grads.append(torch.randn(5, 6, 2, generator=generator).transpose(1, 2))
    grads, keep = [grad.to(DEVICE) for grad in grads], torch.arange(5, device=DEVICE) != 2
    norms, expected = (ops.sq_norms(grads, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(norms, expected)
    sums = [
        ops.clip_and_sum(grads, norms, keep, max_grad_norm=1.5, loss_scale=0.3, impl=impl)
        for impl in ("triton", "reference")
    ]
    torch.testing.assert_close(*sums)


def test_more_records_than_a_grid_holds_are_refused_by_number():
    too_many = launch.Launch(None, (1, 70_000), {}, {}, 0, 0)
    with pytest.raises(ValueError, match=r"at most 65535 records.*70000"):
        too_many()
    launch.Launch(None, (0, 1), {}, {}, 0, 0)()  # nothing to do
