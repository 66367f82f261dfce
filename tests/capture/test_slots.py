"""The two holders of per-record gradients: the same gradients, in the same order."""

from functools import partial
from itertools import chain

import pytest
import torch
from torch import nn

from dpengine import Capture, PrivacyError
from dpengine.capture.slots import Layout, SeparateGrads, Slab
from dpengine.mechanism.clipping import Flat, PerLayer

N = 4
HOLDERS = [SeparateGrads, Slab]


class Net(nn.Module):
    """Weights wider and taller than square, sizes that fill no row, one used twice, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.wide = nn.Linear(6, 3)
        self.tall = nn.Linear(3, 7, bias=False)
        self.unused = nn.Linear(2, 3)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(7, 7)
        self.head_too = nn.Linear(7, 7)
        self.head_too.weight = self.head.weight

    def forward(self, ids):
        x = self.tall(self.wide(self.embedding(ids)).sin())
        x = self.norm(self.conv(x[:, None]).mean(1))
        return self.head_too(self.head(self.head(x)).sin())


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@pytest.fixture
def layered(net) -> nn.Module:
    """Without the parameter of its own, so that each layer has its rule."""
    del net.scale
    return net


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([0, 1, 4, 2, 2, 3, 1, 0])


def taken(module: nn.Module, ids: torch.Tensor, holder, dtype=torch.float32):
    """The gradients of N records of two draws, in ``holder``."""
    capture = Capture(module, draws_per_record=2, dtype=dtype)
    capture._holder = partial(holder, capture.layout)
    module(ids).square().sum().backward()
    grads = capture.take().grads
    capture.detach()
    assert type(grads) is holder
    return capture.parameters, grads


def alone(module: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """One ordinary backward pass for each record, in float64."""
    params = [param.double() for param in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    grads = []
    for n in range(N):
        leaves = [param.detach().clone().requires_grad_() for param in params]
        own = dict(zip(names, leaves, strict=True))
        output = torch.func.functional_call(module, own, (ids[2 * n : 2 * n + 2],))
        grads.append(
            torch.autograd.grad(
                output.square().sum(), leaves, allow_unused=True, materialize_grads=True
            )
        )
    return [torch.stack(column) for column in zip(*grads, strict=True)]


@pytest.mark.parametrize("whole_module", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_holder_has_the_gradients_of_each_record(net, ids, holder, whole_module):
    """By a rule for each layer, and as one module by `torch.func`."""
    if not whole_module:
        del net.scale
    params, grads = taken(net, ids, holder)
    for param, ours, exact in zip(params, grads.by_param, alone(net, ids), strict=True):
        assert ours.shape == (N, *param.shape)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("holder", HOLDERS)
def test_whole_by_layer_and_by_param_hold_the_same(layered, ids, holder, dtype):
    params, grads = taken(layered, ids, holder, dtype)
    elements = torch.cat([grad.reshape(N, -1) for grad in grads.by_param], dim=1)
    assert elements.dtype == dtype
    for columns in (grads.whole, [*chain(*grads.by_layer)]):
        packed = [grads.pack(torch.cat([c[n] for c in columns])) for n in range(N)]
        assert torch.equal(torch.stack(packed), elements)
    names = [name.split(".")[0] for name, _ in layered.named_parameters()]
    assert len(grads.by_layer) == len(set(names)) == 8
    layers = {
        name: torch.cat(
            [g.reshape(N, -1) for g, own in zip(grads.by_param, names, strict=True) if own == name],
            dim=1,
        )
        for name in names
    }
    for ours, exact in zip(grads.by_layer, layers.values(), strict=True):
        torch.testing.assert_close(
            sum(columns.double().square().sum(1) for columns in ours),
            exact.double().square().sum(1),
            rtol=1e-12,
            atol=0,
        )
    assert sum(param.numel() for param in params) == elements.shape[1]


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_clipped_sum_is_that_of_the_parameters(layered, ids, holder):
    _, grads = taken(layered, ids, holder)
    is_record = torch.tensor([True, True, False, True])
    clipping = Flat(0.5)
    ours = grads.pack(clipping.clip_and_sum(grads.whole, is_record).values)
    expected = clipping.clip_and_sum([g.contiguous() for g in grads.by_param], is_record).values
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    layers = grads.pack(PerLayer(0.5).clip_and_sum(grads.by_layer, is_record).values)
    assert layers.shape == ours.shape
    assert 0 < float(layers.norm()) <= 3 * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_holders_have_the_same_gradients(layered, ids, dtype):
    (_, separate), (_, slab) = (taken(layered, ids, holder, dtype) for holder in HOLDERS)
    for a, b in zip(separate.by_param, slab.by_param, strict=True):
        assert torch.equal(a, b)


def test_columns_between_the_parameters_stay_zero(layered, ids):
    capture = Capture(layered, draws_per_record=2)
    slab = Slab(capture.layout, N)
    capture._holder = lambda n_slots: slab
    used = torch.zeros(slab.values.shape[1], dtype=torch.bool)
    for start, param in zip(capture.layout.starts, capture.parameters, strict=False):
        assert start * 4 % 64 == 0
        used[start : start + param.numel()] = True
    for _ in range(2):
        slab.begin()
        layered(ids).square().sum().backward()
        capture.take()
        assert not used.all()
        assert (slab.values[:, ~used] == 0).all()
    assert slab.values.shape[1] * 4 % 64 == 0


def test_a_slab_is_written_over_by_the_next_batch(layered, ids):
    """Not added to; what the next batch does not use is zero."""
    capture = Capture(layered, draws_per_record=2)
    slab = Slab(capture.layout, N)
    for view in slab.by_param:
        view.fill_(torch.nan)
    capture._holder = lambda n_slots: slab
    results = []
    for _ in range(2):
        slab.begin()
        layered(ids).square().sum().backward()
        results.append(torch.cat([g.flatten(1) for g in capture.take().per_record_grads], 1))
    assert torch.equal(*results)
    assert not results[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_second_use_is_added_and_a_missing_one_is_zero(holder, dtype):
    param, other = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    grads = holder(Layout((param, other), (0, 1), dtype), N)
    first = torch.arange(6.0).view(1, 2, 3).expand(N, 2, 3)
    grads.record(param, first.clone())
    assert grads.view(param) is None
    grads.record(param, torch.ones(N, 2, 3))
    grads.record(param, torch.full((N, 2, 3), 2.0))
    grads.record(torch.zeros(3), torch.ones(N, 3))  # frozen
    with pytest.raises(PrivacyError, match="trained that was not"):
        grads.record(nn.Parameter(torch.zeros(3)), torch.ones(N, 3))
    grads.finish()
    ours, unused = grads.by_param
    assert torch.equal(ours, (first + 3).to(dtype))
    assert unused.dtype == dtype
    assert unused.shape == (N, 3) and (unused == 0).all()


def test_parameters_of_a_layer_are_neighbours_and_tied_ones_belong_to_the_first(layered):
    capture = Capture(layered)
    layout = capture.layout
    assert list(layout.layers) == sorted(layout.layers)
    names = {param: name for name, param in layered.named_parameters()}
    groups = [[names[p] for p in layout.params[group]] for group in layout.groups]
    assert groups == [
        ["embedding.weight"],
        ["wide.weight", "wide.bias"],
        ["tall.weight"],
        ["unused.weight", "unused.bias"],
        ["conv.weight", "conv.bias"],
        ["norm.weight", "norm.bias"],
        ["head.weight", "head.bias"],
        ["head_too.bias"],
    ]


class Once(nn.Module):
    """Linear layers used once each, beside other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.up = nn.Linear(6, 40)
        self.down = nn.Linear(40, 3, bias=False)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids):
        return self.norm(self.down(self.up(self.embedding(ids)).sin()))


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_norms_alone_give_the_same_clipped_sum(shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Once()
    ids = torch.arange(24).view(8, 3)[:, :: 4 - 1 if len(shape) == 1 else 1] % 5
    ids = ids.flatten() if len(shape) == 1 else ids
    sums, grads_of_records = [], []
    for norm_only in (False, True):
        capture = Capture(module, draws_per_record=2, norm_only=norm_only)
        module(ids).square().sum().backward()
        batch = capture.take()
        for clipping in (Flat(0.5), PerLayer(0.5)):
            grads = batch.grads.by_layer if clipping == PerLayer(0.5) else batch.grads.whole
            sums.append(batch.grads.pack(clipping.clip_and_sum(grads, batch.is_record).values))
        grads_of_records.append(batch.per_record_grads)
        capture.detach()
    torch.testing.assert_close(sums[:2], sums[2:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*grads_of_records)


def test_norms_alone_refuse_a_second_use(layered, ids):
    Capture(layered, draws_per_record=2, norm_only=True)
    with pytest.raises(
        ValueError, match=r"\(7, 7\) is used (twice|by two layers).*leave norm_only"
    ):
        layered(ids).square().sum().backward()
