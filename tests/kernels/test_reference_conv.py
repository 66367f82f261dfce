"""Side A of a LoRA convolution against autograd through ``F.conv2d`` over single records."""

import pytest
import torch
import torch.nn.functional as F

from dpengine.kernels import reference

CHANNELS, N_RECORDS = 5, 3
GEOMETRIES = {
    "1x1": dict(size=(6, 4), kernel=(1, 1)),
    "3x3 same": dict(size=(6, 4), kernel=(3, 3), padding=(1, 1)),
    "3x3 valid, odd size": dict(size=(7, 5), kernel=(3, 3)),
    "stride 2, odd size": dict(size=(7, 9), kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "stride 2, last column unused": dict(size=(8, 6), kernel=(3, 3), stride=(2, 2)),
    "dilation": dict(size=(9, 8), kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    "all unequal": dict(
        size=(11, 9), kernel=(2, 3), stride=(3, 2), padding=(1, 2), dilation=(2, 1)
    ),
    "1-D as H=1": dict(size=(1, 13), kernel=(1, 3), stride=(1, 2), padding=(0, 1)),
    "one pixel out": dict(size=(3, 3), kernel=(3, 3)),
}


def geometry(size, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    return size, kernel, dict(stride=stride, padding=padding, dilation=dilation)


def conv_inputs(draws, rank, size, kernel, where, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_RECORDS * draws, CHANNELS, *size, generator=generator).to(dtype)
    pixels = F.conv2d(x, x.new_zeros(rank, CHANNELS, *kernel), **where).shape[2:]
    return x, torch.randn(N_RECORDS * draws, rank, *pixels, generator=generator).to(dtype)


def autograd_loop(x, u, kernel, where, dtype):
    weight = torch.zeros(u.shape[1], CHANNELS, *kernel, dtype=dtype, requires_grad=True)
    grads = []
    for x_n, u_n in zip(x.to(dtype).chunk(N_RECORDS), u.to(dtype).chunk(N_RECORDS), strict=True):
        loss = (u_n * F.conv2d(x_n, weight, **where)).sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    return torch.stack(grads)


@pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
@pytest.mark.parametrize("rank", [1, 3, 17], ids="R={}".format)
@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_side_a_is_the_weight_gradient_of_every_single_record(case, rank, draws):
    size, kernel, where = geometry(**case)
    x, u = conv_inputs(draws, rank, size, kernel, where)
    grad_a = reference.lora_conv_side_a(x, u, kernel, n_records=N_RECORDS, **where)
    exact = autograd_loop(x, u, kernel, where, torch.float64)
    size_of_terms = autograd_loop(x.abs(), u.abs(), kernel, where, torch.float64)
    n_terms = draws * u.shape[2] * u.shape[3]
    assert grad_a.dtype == torch.float32 and grad_a.shape == exact.shape
    # Higham, Accuracy and Stability, section 3.1.
    assert ((grad_a - exact).abs() <= (n_terms + 1) * 2.0**-24 * size_of_terms).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_side_a_accumulates_narrow_inputs_in_float32(dtype):
    size, kernel, where = geometry(**GEOMETRIES["all unequal"])
    x, u = conv_inputs(4, 3, size, kernel, where, dtype)
    grad_a = reference.lora_conv_side_a(x, u, kernel, n_records=N_RECORDS, **where)
    exact = autograd_loop(x, u, kernel, where, torch.float64)
    size_of_terms = autograd_loop(x.abs(), u.abs(), kernel, where, torch.float64)
    n_terms = 4 * u.shape[2] * u.shape[3]
    assert grad_a.dtype == torch.float32
    assert ((grad_a - exact).abs() <= (n_terms + 1) * 2.0**-24 * size_of_terms).all()


def test_a_float64_convolution_is_computed_in_float64():
    size, kernel, where = geometry(**GEOMETRIES["all unequal"])
    x, u = conv_inputs(4, 3, size, kernel, where, torch.float64)
    grad_a = reference.lora_conv_side_a(x, u, kernel, n_records=N_RECORDS, **where)
    exact = autograd_loop(x, u, kernel, where, torch.float64)
    size_of_terms = autograd_loop(x.abs(), u.abs(), kernel, where, torch.float64)
    n_terms = 4 * u.shape[2] * u.shape[3]
    # Both round in float64.
    assert ((grad_a - exact).abs() <= 2 * (n_terms + 1) * 2.0**-53 * size_of_terms).all()


def test_conv_side_a_of_a_1x1_kernel_is_side_a_with_the_channels_last():
    x, u = conv_inputs(4, 3, (6, 4), (1, 1), {})
    ones, none = (1, 1), (0, 0)
    conv = reference.lora_conv_side_a(x, u, ones, ones, none, ones, N_RECORDS)
    lora_a = torch.zeros(3, CHANNELS)
    rows = reference.lora_side_a(x.movedim(1, -1), u.movedim(1, -1), lora_a, N_RECORDS)
    assert torch.equal(conv.flatten(2), rows)


def test_draws_of_a_convolution_that_cancel_leave_the_gradient_of_the_rest():
    size, kernel, where = geometry(**GEOMETRIES["3x3 same"])
    x, u = conv_inputs(4, 3, size, kernel, where)
    x[1::4] = x[0::4]
    u[0::4] *= 1e6
    u[1::4] = -u[0::4]
    grad_a = reference.lora_conv_side_a(x, u, kernel, n_records=N_RECORDS, **where)
    kept = torch.arange(4 * N_RECORDS) % 4 >= 2
    rest = autograd_loop(x[kept], u[kept], kernel, where, torch.float64)
    size_of_terms = autograd_loop(x.abs(), u.abs(), kernel, where, torch.float64)
    n_terms = 4 * size[0] * size[1]
    assert ((grad_a - rest).abs() <= (n_terms + 1) * 2.0**-24 * size_of_terms).all()
