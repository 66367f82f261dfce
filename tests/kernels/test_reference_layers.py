"""Embeddings, biases and the affine weights of norms against autograd over single records."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpengine.kernels import reference

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
TOKENS = {"2-D": (), "3-D": (7,), "4-D": (3, 5)}
N_RECORDS, CHANNELS, VOCABULARY = 3, 12, 6

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_layout = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
every_draws = pytest.mark.parametrize("draws", [1, 4], ids="K={}".format)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_ids(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def gradients_of_single_records(forward, parameter, backprops, *inputs):
    """float64 [N, ...]: backward of ``Σ g · forward(inputs)`` for every record on its own."""
    grads = []
    rows = zip(*(t.chunk(N_RECORDS) for t in (backprops, *inputs)), strict=True)
    for g, *own in rows:
        leaf = parameter.double().clone().requires_grad_()
        loss = (g.double() * forward(leaf, *own)).sum()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    return torch.stack(grads)


def assert_within_roundoff(grad, exact, sizes, n_terms):
    """Higham, section 3.1: each sum of products against the other, rounded in grad's type."""
    unit = torch.finfo(grad.dtype).eps / 2
    assert grad.dtype in (torch.float32, torch.float64)
    assert grad.shape == exact.shape
    assert ((grad - exact).abs() <= 2 * (n_terms + 1) * unit * sizes).all()


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1], ids="pad={}".format)
@every_draws
@every_layout
@every_dtype
def test_embedding_grads_are_those_of_every_single_record(
    dtype, tokens, draws, padding_idx, id_dtype
):
    rows = (N_RECORDS * draws, *tokens)
    ids, g = random_ids(*rows).to(id_dtype), normal(*rows, CHANNELS, dtype=dtype)
    table = torch.zeros(VOCABULARY, CHANNELS)

    def forward(weight, own_ids):
        return F.embedding(own_ids.long(), weight, padding_idx)

    grad = reference.embedding_per_record_grads(ids, g, VOCABULARY, N_RECORDS, padding_idx)
    exact = gradients_of_single_records(forward, table, g, ids)
    sizes = gradients_of_single_records(forward, table, g.abs(), ids)
    assert_within_roundoff(grad, exact, sizes, draws * max(1, torch.Size(tokens).numel()))


def test_an_id_that_all_tokens_share_gets_the_sum_and_the_others_nothing():
    # Ones count: 2 draws of 7 tokens.
    ids = torch.tensor([2, 2, 0, 0, 5, 5])[:, None].expand(6, 7)
    grad = reference.embedding_per_record_grads(ids, torch.ones(6, 7, 4), VOCABULARY, 3)
    expected = torch.zeros(3, VOCABULARY, 4)
    expected[[0, 1, 2], [2, 0, 5]] = 14
    assert torch.equal(grad, expected)


def test_a_bad_value_at_the_padding_id_reaches_no_gradient():
    ids, g = torch.tensor([[1, 2], [1, 3]]), torch.ones(2, 2, 4)
    g[:, 0] = torch.nan
    grad = reference.embedding_per_record_grads(ids, g, VOCABULARY, 2, padding_idx=1)
    assert reference.sq_norms([grad]).tolist() == [4.0, 4.0]
    assert (grad[:, 1] == 0).all()


@every_draws
@every_layout
@every_dtype
def test_bias_grads_are_those_of_every_single_record(dtype, tokens, draws):
    g = normal(N_RECORDS * draws, *tokens, CHANNELS, dtype=dtype)
    bias = torch.zeros(CHANNELS)

    def forward(leaf, own):
        return torch.zeros_like(own, dtype=torch.float64) + leaf

    grad = reference.bias_per_record_grads(g, N_RECORDS)
    exact = gradients_of_single_records(forward, bias, g, g)
    sizes = gradients_of_single_records(forward, bias, g.abs(), g)
    assert_within_roundoff(grad, exact, sizes, draws * torch.Size(tokens).numel())


@every_draws
def test_bias_grads_of_a_convolution_sum_its_pixels(draws):
    g = normal(N_RECORDS * draws, CHANNELS, 4, 5)
    x = normal(N_RECORDS * draws, 2, 4, 5, seed=1)
    kernel = normal(CHANNELS, 2, 1, 1, seed=2).double()

    def forward(leaf, own_x):
        return F.conv2d(own_x.double(), kernel, leaf)

    grad = reference.bias_per_record_grads(g.movedim(1, -1), N_RECORDS)
    exact = gradients_of_single_records(forward, torch.zeros(CHANNELS), g, x)
    sizes = gradients_of_single_records(forward, torch.zeros(CHANNELS), g.abs(), x)
    assert_within_roundoff(grad, exact, sizes, draws * 20)


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(CHANNELS), (7, CHANNELS), -1),
    "RMSNorm": (lambda: nn.RMSNorm(CHANNELS, eps=1e-6), (3, 5, CHANNELS), -1),
    "GroupNorm of images": (lambda: nn.GroupNorm(4, CHANNELS), (CHANNELS, 4, 5), 1),
    "GroupNorm of vectors": (lambda: nn.GroupNorm(4, CHANNELS), (CHANNELS,), 1),
}


def normalized(norm, x):
    """The layer's output before weight and bias."""
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, eps=norm.eps)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return F.rms_norm(x, norm.normalized_shape, eps=norm.eps)


@every_draws
@pytest.mark.parametrize(("make", "shape", "channel_dim"), NORMS.values(), ids=NORMS)
def test_the_affine_grads_of_norms_are_those_of_every_single_record(
    make, shape, channel_dim, draws
):
    norm = make().double()
    x = normal(N_RECORDS * draws, *shape, dtype=torch.float64)
    g = normal(*x.shape, dtype=torch.float64, seed=1)
    x_hat = normalized(norm, x)
    scale = reference.scale_per_record_grads(
        g.movedim(channel_dim, -1), x_hat.movedim(channel_dim, -1), N_RECORDS
    )
    shift = reference.bias_per_record_grads(g.movedim(channel_dim, -1), N_RECORDS)
    n_terms = draws * g[0].numel() // CHANNELS
    for ours, name in ((scale, "weight"), (shift, "bias")):
        if (parameter := getattr(norm, name, None)) is None:
            continue

        def forward(leaf, own_x, name=name):
            return torch.func.functional_call(norm, {name: leaf}, own_x)

        exact = gradients_of_single_records(forward, parameter.detach(), g, x)
        # The float64 norm of a record on its own may round x_hat once more in each of its steps.
        assert (ours - exact).norm() <= 2.0**-53 * 16 * n_terms**0.5 * g.norm() * x_hat.abs().max()


@every_draws
@every_layout
@every_dtype
def test_scale_grads_accumulate_products_in_float32_or_wider(dtype, tokens, draws):
    rows = (N_RECORDS * draws, *tokens, CHANNELS)
    g, x_hat = normal(*rows, dtype=dtype), normal(*rows, dtype=dtype, seed=1)

    def forward(leaf, own):
        return own.double() * leaf

    grad = reference.scale_per_record_grads(g, x_hat, N_RECORDS)
    exact = gradients_of_single_records(forward, torch.ones(CHANNELS), g, x_hat)
    sizes = gradients_of_single_records(forward, torch.ones(CHANNELS), g.abs(), x_hat.abs())
    assert_within_roundoff(grad, exact, sizes, draws * torch.Size(tokens).numel())


@pytest.mark.parametrize("op", ["bias", "scale", "embedding"])
def test_draws_that_cancel_leave_the_gradient_of_the_rest(op):
    g, x = normal(N_RECORDS * 4, 7, CHANNELS), normal(N_RECORDS * 4, 7, CHANNELS, seed=1)
    ids = random_ids(N_RECORDS * 4, 7)
    g[0::4] *= 1e6
    g[1::4], x[1::4], ids[1::4] = -g[0::4], x[0::4], ids[0::4]

    def grads(g, x, ids):
        if op == "bias":
            return reference.bias_per_record_grads(g, N_RECORDS)
        if op == "scale":
            return reference.scale_per_record_grads(g, x, N_RECORDS)
        return reference.embedding_per_record_grads(ids, g, VOCABULARY, N_RECORDS)

    kept = torch.arange(N_RECORDS * 4) % 4 >= 2
    rest = grads(g[kept].double(), x[kept].double(), ids[kept])
    assert_within_roundoff(grads(g, x, ids), rest, grads(g.abs(), x.abs(), ids), 28)
