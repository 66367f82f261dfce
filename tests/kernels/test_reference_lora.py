"""The LoRA ops against autograd over single records, in float64 on the same rounded inputs."""

import pytest
import torch

from dpengine.kernels import reference

IN, OUT, SCALING = 48, 32, 0.7
TOKENS = {"2-D": (), "3-D": (7,), "4-D": (3, 5)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

every_layout = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
every_rank = pytest.mark.parametrize("rank", [1, 3, 17], ids="R={}".format)
every_draws = pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def lora_inputs(n_records, draws, rank, tokens=(7,), dtype=torch.float32, seed=0):
    """x and g in ``dtype``; the parameters stay in float32, as those in training do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = (n_records * draws, *tokens)
    x, g = normal(*rows, IN).to(dtype), normal(*rows, OUT).to(dtype)
    return x, g, normal(rank, IN), normal(OUT, rank)


def autograd_loop(x, g, lora_a, lora_b, n_records, dtype):
    """h, u, dx, grad_a and grad_b by one forward and backward for every record on its own.

    Computed in ``dtype`` from inputs rounded to the type of x.
    """
    x, g, lora_a, lora_b = (t.to(x.dtype).to(dtype) for t in (x, g, lora_a, lora_b))
    results = []
    for x_n, g_n in zip(x.chunk(n_records), g.chunk(n_records), strict=True):
        x_n, a, b = (t.clone().requires_grad_() for t in (x_n, lora_a, lora_b))
        h = x_n @ a.T
        loss = (g_n * (SCALING * (h @ b.T))).sum()
        results.append((h.detach(), *torch.autograd.grad(loss, (h, x_n, a, b))))
    h, u, dx, grad_a, grad_b = zip(*results, strict=True)
    return torch.cat(h), torch.cat(u), torch.cat(dx), torch.stack(grad_a), torch.stack(grad_b)


def assert_as_good_as_eager(value, exact, eager):
    """At most twice the error of eager PyTorch, beside one rounding where that keeps more bits."""
    assert value.shape == exact.shape
    error = (value - exact).abs()
    if value.dtype != eager.dtype:
        finfo = torch.finfo(value.dtype)
        rounding = finfo.eps / 2 * value.double().abs().clamp(min=finfo.tiny)
        error = (error - rounding).clamp(min=0)
    assert error.norm() <= 2 * (eager - exact).norm()


def assert_backward_is_as_good_as_eager(x, g, lora_a, lora_b, n_records):
    """Both sides one after the other in float32, against autograd through the layer."""
    exact = autograd_loop(x, g, lora_a, lora_b, n_records, torch.float64)
    eager = autograd_loop(x, g, lora_a, lora_b, n_records, torch.float32)
    h = reference.lora_forward(torch.zeros_like(g), x, lora_a, lora_b, SCALING)
    u, grad_b = reference.lora_side_b(g, h, lora_b, SCALING, n_records)
    dx = torch.zeros_like(x)
    grad_a = reference.lora_side_a(x, u, lora_a, n_records, dx)
    for value, e64, e32 in zip((h, u, dx, grad_a, grad_b), exact, eager, strict=True):
        assert value.dtype == torch.float32
        assert_as_good_as_eager(value, e64, e32)
    return grad_a, grad_b


@pytest.mark.parametrize("n_records", [1, 5], ids="N={}".format)
@every_draws
@every_rank
@every_layout
def test_the_three_ops_are_the_backward_pass_of_every_single_record(tokens, rank, draws, n_records):
    assert_backward_is_as_good_as_eager(*lora_inputs(n_records, draws, rank, tokens), n_records)


@every_dtype
@every_rank
@every_layout
def test_forward_adds_the_scaled_update_in_place(tokens, rank, dtype):
    x, base, lora_a, lora_b = lora_inputs(6, 1, rank, tokens, dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    exact_h = x.double() @ a.double().T
    eager_h = x @ a.T
    output = base.clone()
    h = reference.lora_forward(output, x, lora_a, lora_b, SCALING)
    assert h.dtype == output.dtype == dtype
    assert_as_good_as_eager(h, exact_h, eager_h)
    exact = base.double() + SCALING * exact_h @ b.double().T
    assert_as_good_as_eager(output, exact, base + SCALING * (eager_h @ b.T))


@every_dtype
@every_draws
@every_rank
@every_layout
def test_side_b_rounds_u_once_and_accumulates_grad_b_in_float32(tokens, rank, draws, dtype):
    x, g, lora_a, lora_b = lora_inputs(3, draws, rank, tokens, dtype)
    h = x @ lora_a.to(dtype).T
    u, grad_b = reference.lora_side_b(g, h, lora_b, SCALING, 3)
    assert u.dtype == dtype and grad_b.dtype == torch.float32
    results = []
    for compute in (torch.float64, torch.float32):
        s_g = SCALING * g.to(compute)
        products = [
            (s_g_n.reshape(-1, OUT).T @ h_n.reshape(-1, rank))
            for s_g_n, h_n in zip(s_g.chunk(3), h.to(compute).chunk(3), strict=True)
        ]
        results.append((s_g @ lora_b.to(dtype).to(compute), torch.stack(products)))
    for value, exact, eager in zip((u, grad_b), *results, strict=True):
        assert_as_good_as_eager(value, exact, eager)


@every_dtype
@every_draws
@every_rank
@every_layout
def test_side_a_accumulates_grad_a_in_float32_and_adds_to_input_grad(tokens, rank, draws, dtype):
    x, _, lora_a, _ = lora_inputs(3, draws, rank, tokens, dtype)
    u, input_grad = x[..., :rank].flip(-1), x.flip(0).clone()
    before = input_grad.clone()
    grad_a = reference.lora_side_a(x, u, lora_a, 3, input_grad)
    assert grad_a.dtype == torch.float32 and input_grad.dtype == dtype
    products = []
    for compute in (torch.float64, torch.float32):
        pairs = zip(u.to(compute).chunk(3), x.to(compute).chunk(3), strict=True)
        products.append(
            torch.stack([u_n.reshape(-1, rank).T @ x_n.reshape(-1, IN) for u_n, x_n in pairs])
        )
    assert_as_good_as_eager(grad_a, *products)
    a = lora_a.to(dtype)
    exact = before.double() + u.double() @ a.double()
    assert_as_good_as_eager(input_grad, exact, before + u @ a)


def test_side_a_without_input_grad_gives_the_same_bits():
    x, _, lora_a, _ = lora_inputs(3, 4, 5)
    u = x[..., :5].contiguous()
    with_input_grad = reference.lora_side_a(x, u, lora_a, 3, torch.zeros_like(x))
    without = reference.lora_side_a(x, u, lora_a, 3)
    assert torch.equal(with_input_grad, without)


def test_adapters_joined_along_the_rank_get_their_own_gradients_and_add_to_one_input_grad():
    ranks, results = (1, 3, 4), []
    x, _, joined_a, _ = lora_inputs(5, 4, sum(ranks))
    u = torch.randn(20, 7, sum(ranks), generator=torch.Generator().manual_seed(1))
    input_grad = torch.ones_like(x)
    grad = reference.lora_side_a(x, u, joined_a, 5, input_grad)
    for dtype in (torch.float64, torch.float32):
        dx, grads = torch.ones_like(x, dtype=dtype), []
        for u_part, a_part in zip(u.split(ranks, -1), joined_a.split(ranks), strict=True):
            alone = x.to(dtype).requires_grad_(), a_part.to(dtype).requires_grad_()
            h = alone[0] @ alone[1].T
            per_record = (u_part.to(dtype) * h).unflatten(0, (5, 4)).sum((1, 2, 3))
            grads.append(
                torch.stack(
                    [torch.autograd.grad(p, alone[1], retain_graph=True)[0] for p in per_record]
                )
            )
            dx += torch.autograd.grad(per_record.sum(), alone[0])[0]
        results.append((torch.cat(grads, 1), dx))
    for value, exact, eager in zip((grad, input_grad), *results, strict=True):
        assert_as_good_as_eager(value, exact, eager)


def test_float64_inputs_are_computed_in_float64():
    x, g, lora_a, lora_b = (t.double() for t in lora_inputs(5, 4, 3))
    exact = autograd_loop(x, g, lora_a, lora_b, 5, torch.float64)
    sizes = autograd_loop(x.abs(), g.abs(), lora_a.abs(), lora_b.abs(), 5, torch.float64)
    h = reference.lora_forward(torch.zeros_like(g), x, lora_a, lora_b, SCALING)
    u, grad_b = reference.lora_side_b(g, h, lora_b, SCALING, 5)
    dx = torch.zeros_like(x)
    grad_a = reference.lora_side_a(x, u, lora_a, 5, dx)
    # Higham, section 3.1: two sums of at most 28 + 48 + 32 terms, each result against the other.
    gamma = 2 * 120 * 2.0**-53
    for value, e64, size in zip((h, u, dx, grad_a, grad_b), exact, sizes, strict=True):
        assert ((value - e64).abs() <= gamma * size).all()


def test_aligned_draws_add_up():
    x, g, lora_a, lora_b = lora_inputs(5, 1, 3)
    x, g = x.repeat_interleave(4, 0), g.repeat_interleave(4, 0)
    assert_backward_is_as_good_as_eager(x, g, lora_a, lora_b, 5)


def test_orthogonal_draws_add_up():
    x, g, lora_a, lora_b = lora_inputs(5, 4, 3)
    for draw in range(4):
        outside = torch.ones(IN, dtype=torch.bool)
        outside[draw * 12 : (draw + 1) * 12] = False
        x[draw::4, :, outside] = 0
    assert_backward_is_as_good_as_eager(x, g, lora_a, lora_b, 5)


def test_cancelling_draws_leave_the_gradient_of_their_sum():
    # Draws 0 and 1 are opposite and a million times as large as draws 2 and 3.
    x, g, lora_a, lora_b = lora_inputs(5, 4, 3)
    x[1::4] = x[0::4]
    g[0::4] *= 1e6
    g[1::4] = -g[0::4]
    grads = assert_backward_is_as_good_as_eager(x, g, lora_a, lora_b, 5)
    kept = torch.arange(20) % 4 >= 2
    *_, rest_a, rest_b = autograd_loop(x[kept], g[kept], lora_a, lora_b, 5, torch.float64)
    terms = 2 * 2 * 7 * 1e6  # size of what cancels, in units of the remainder
    for ours, rest in zip(grads, (rest_a, rest_b), strict=True):
        assert (ours - rest).norm() <= terms * 2**-24 * rest.norm()
