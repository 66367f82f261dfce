"""Modules without a rule of their own, by `torch.func`, against single records in float64."""

from functools import partial

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpengine import Capture

N = 4

CONVOLUTIONS = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
    "same": lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2),
}


@pytest.fixture(autouse=True)
def public_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolutions(compare, randomized, rows, make, draws):
    compare(randomized(make()), rows(N * draws, 4, 5, 6), draws=draws)


class Gated(nn.Module):
    """A parameter of its own, beside a child that PEFT adapts, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(5))
        self.temperature = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x * self.gate).sin() * self.temperature.exp() + self.gate


def gated() -> nn.Module:
    module = inject_adapter_in_model(LoraConfig(r=2, target_modules=["inner"]), Gated())
    for param in (module.gate, module.temperature, module.unused):
        param.requires_grad_(True)
    return module


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_a_module_with_a_parameter_and_an_adapter(compare, randomized, rows, shape, draws):
    grads = compare(randomized(gated()), rows(N * draws, *shape), draws=draws, unused=("unused",))
    assert len(grads) == 5


def twice(module, x):
    return module(module(x))


class Applied(nn.Module):
    """Calls ``apply`` on its only child."""

    def __init__(self, child: nn.Module, apply) -> None:
        super().__init__()
        self.child = child
        self.apply_child = apply

    def forward(self, *args):
        return self.apply_child(self.child, *args)


def test_a_module_used_twice_adds_up(compare, randomized, rows):
    """The gradient of an added parameter is the very gradient at the output, which others read."""
    compare(randomized(Applied(gated(), twice)), rows(N, 5), unused=("child.unused",))


@pytest.mark.parametrize("draws", [1, 3])
def test_attention_of_torch(compare, randomized, rows, draws):
    attention = randomized(nn.MultiheadAttention(6, 2, batch_first=True, kdim=4, vdim=5))
    module = Applied(attention, lambda child, q, k, v: child(q, k, v)[0])
    n = N * draws
    compare(
        module,
        rows(n, 3, 6),
        rows(n, 5, 4, seed=1),
        rows(n, 5, 5, seed=2),
        draws=draws,
    )


def test_attention_without_weights(compare, randomized, rows):
    """A tuple that holds a None."""
    attention = randomized(nn.MultiheadAttention(6, 2, batch_first=True))
    module = Applied(attention, lambda child, x: child(x, x, x, need_weights=False)[0])
    compare(module, rows(N * 2, 3, 6), draws=2)


class Many(nn.Module):
    """Tensors and others, by position and by name, in and out in nests."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x, pair, power, *, ids, flag=False, mask=None):
        x = self.linear(x) * self.scale + pair[0] * pair[1]["shift"]
        x = x**power + ids[:, None].to(x) * self.scale
        return {
            "x": (x if mask is None else x * mask, ids + 1),
            "rest": [2 * x.sin(), "name", None],
        }


@pytest.mark.parametrize("draws", [1, 3])
def test_many_arguments_and_outputs(compare, randomized, rows, draws):
    n = N * draws
    ids, mask = torch.arange(n) % 3, torch.tensor([1.0, 0.0, 2.0])

    def apply(child, x, y, shift, ids):
        out = child(x, [y, {"shift": shift}], 2, ids=ids, mask=mask.to(x))
        assert torch.equal(out["x"][1], ids + 1)
        assert out["rest"][1:] == ["name", None]
        return out["x"][0] + out["rest"][0]

    many = [rows(n, 3, seed=seed) for seed in range(3)]
    compare(Applied(randomized(Many()), apply), *many, ids, draws=draws)


def test_only_one_of_the_outputs_is_used(compare, randomized, rows):
    def apply(child, x, y, shift):
        ids = torch.zeros(len(x), dtype=torch.long)
        return child(x, [y, {"shift": shift}], 2, ids=ids)["rest"][0]

    many = [rows(N * 2, 3, seed=seed) for seed in range(3)]
    compare(Applied(randomized(Many()), apply), *many, draws=2)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x, shared):
        return (x * self.scale + shared).sin()


def test_a_shared_argument_has_the_gradient_of_all_rows(randomized, rows):
    module, x = randomized(Shifted()), rows(N * 2, 3)
    gradients = []
    for captured in (False, True):
        shared = torch.ones(3, requires_grad=True)
        capture = Capture(module, draws_per_record=2) if captured else None
        module(x, shared).square().sum().backward()
        gradients.append(shared.grad)
        if captured:
            exact = torch.stack([_scale_grad(module, x[2 * n : 2 * n + 2]) for n in range(N)])
            torch.testing.assert_close(capture.take().per_record_grads[0], exact)
        module.zero_grad()
    torch.testing.assert_close(*gradients)


def _scale_grad(module, x):
    scale = module.scale.detach().clone().requires_grad_()
    loss = (x * scale + 1).sin().square().sum()
    return torch.autograd.grad(loss, scale)[0]


@pytest.mark.parametrize("kind", ["identical", "orthogonal", "cancelling"])
@pytest.mark.parametrize("make", [CONVOLUTIONS["grouped"], lambda: nn.PReLU(4)])
def test_one_record_contributes_at_most_the_bound(contribution, randomized, rows, make, kind):
    for norm in contribution(
        randomized(make()), rows(N * 3, 4, 5, 6), draws=3, kind=kind, scale=1e6, max_grad_norm=0.7
    ):
        assert 0.99 * 0.7 < norm <= 0.7 * (1 - 2**-24)


def test_non_reentrant_checkpointing(compare, randomized, rows):
    recomputed = Applied(gated(), partial(checkpoint, use_reentrant=False))
    compare(randomized(recomputed), rows(N * 2, 3, 5), draws=2, unused=("child.unused",))


def test_hooks_of_the_module_run_once(randomized, rows):
    module, calls = randomized(gated()), []
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    capture = Capture(module)
    module(rows(N, 5)).sum().backward()
    capture.take()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "output, error, message",
    [
        (lambda x: x.mean(), ValueError, "one row for each row of the batch.*freeze it"),
        (lambda x: x[:2], ValueError, "another length"),
        (lambda x: {1, 2}, TypeError, "must return tensors.*got a set: freeze it"),
    ],
)
def test_an_output_that_cannot_be_cut_into_records_is_refused(rows, output, error, message):
    module = Shifted()
    Capture(module)
    module_forward = Shifted.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shifted, "forward", lambda self, x, y: output(module_forward(self, x, y)))
        with pytest.raises(error, match=message):
            module(rows(N, 3), torch.ones(3))


def test_what_is_unsound_inside_is_refused_by_name():
    module = Gated()
    module.inner = nn.Embedding(4, 4, max_norm=1.0)
    with pytest.raises(ValueError, match=r"'0\.inner' has max_norm"):
        Capture(nn.Sequential(module))
    module = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["inner"]), Gated())
    module.gate.requires_grad_(True)
    with pytest.raises(TypeError, match=r"'0\.inner' is a peft\.tuners\.loha.*use LoraConfig"):
        Capture(nn.Sequential(module))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_of_rows_of_ids(compare, randomized, mode):
    ids = torch.randint(5, (6, 3), generator=torch.Generator().manual_seed(0))
    compare(randomized(nn.Sequential(nn.EmbeddingBag(5, 4, mode=mode, padding_idx=0))), ids)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_an_embedding_bag_of_weighted_ids(compare, randomized, rows):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(5, 4, mode="sum")

        def forward(self, weights):
            ids = torch.arange(3).expand(len(weights), 3)
            return self.bag(ids, per_sample_weights=weights)

    compare(randomized(Weighted()), rows(6, 3))


@pytest.mark.parametrize("n_ids", [4, 7])
@pytest.mark.parametrize("by_name", [True, False])
def test_an_embedding_bag_of_flat_ids_is_refused_by_name(randomized, n_ids, by_name):
    """Also where there are as many ids as bags, so that each bag could be taken for a row."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(5, 4)

        def forward(self, offsets, ids):
            return self.bag(ids, offsets=offsets) if by_name else self.bag(ids, offsets)

    module = randomized(Bags())
    Capture(module)
    with pytest.raises(ValueError, match=r"bag 'bag' is given the ids of all bags .* \[rows, L\]"):
        module(torch.tensor([0, 1, 1, 3]), torch.arange(n_ids) % 5)
