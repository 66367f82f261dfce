"""Full training of each kind of layer against single records in float64."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from dpengine import Capture

N = 4

LAYERS = {
    "linear 2-D": (lambda: nn.Linear(5, 7), (5,)),
    "linear 3-D": (lambda: nn.Linear(9, 4), (6, 9)),
    "linear 4-D": (lambda: nn.Linear(3, 5), (2, 3, 3)),
    "linear without bias": (lambda: nn.Linear(6, 6, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (3, 9)),
    "conv1d dilated": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, bias=False), (2, 8)),
    "conv2d of size 1": (lambda: nn.Conv2d(4, 6, 1), (4, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "conv2d strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 7)),
    "conv2d uneven": (
        lambda: nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3)),
        (2, 7, 10),
    ),
    "group norm 2-D": (lambda: nn.GroupNorm(2, 6), (6,)),
    "group norm 3-D": (lambda: nn.GroupNorm(3, 6), (6, 5)),
    "group norm 4-D": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "layer norm": (lambda: nn.LayerNorm(7), (5, 7)),
    "layer norm 2-D": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(7, bias=False), (5, 7)),
    "rms norm": (lambda: nn.RMSNorm(7), (5, 7)),
    "rms norm 2-D": (lambda: nn.RMSNorm((3, 4), eps=1e-3), (5, 3, 4)),
}

every_layer = pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
with_bias = pytest.mark.parametrize(
    "make, shape",
    [LAYERS[name] for name in ("linear 3-D", "conv1d", "conv2d", "group norm 4-D", "layer norm")],
)


@pytest.fixture(autouse=True)
def public_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("draws", [1, 3])
@every_layer
def test_a_layer_in_full(compare, randomized, rows, make, shape, draws):
    compare(randomized(make()), rows(N * draws, *shape), draws=draws)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@with_bias
def test_the_bias_or_the_weight_alone(compare, randomized, rows, make, shape, frozen):
    layer = randomized(make())
    getattr(layer, frozen).requires_grad_(False)
    assert len(compare(layer, rows(2 * N, *shape), draws=2)) == 1


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_an_embedding(compare, randomized, draws, shape, padding_idx):
    """Ids repeat within a record, across records, and hit the padding."""
    layer = randomized(nn.Embedding(5, 3, padding_idx=padding_idx))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (16 * draws, *shape), generator=generator)
    if shape == () and padding_idx is not None:
        ids = torch.where(ids == padding_idx % 5, (ids + 1) % 5, ids)
    grads = compare(layer, ids, draws=draws)
    if padding_idx is not None:
        assert (grads[0][:, padding_idx] == 0).all()


@pytest.mark.parametrize("turn", [(0, 2, 1), (0, 1, 2)])
def test_a_strided_input(compare, randomized, rows, turn):
    layer = randomized(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
    compare(layer, rows(N, 6, 6), call=lambda module, x: module(x.permute(turn)))


def test_channels_last(compare, randomized, rows):
    layer = randomized(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)))
    compare(
        layer,
        rows(N, 4, 6, 5),
        call=lambda module, x: module(x.to(memory_format=torch.channels_last)),
    )


def test_an_input_that_needs_no_gradient(compare, randomized, rows):
    layer = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3)))
    compare(layer, rows(2 * N, 2, 5, 5), draws=2, call=lambda module, x: module(x.detach()))


@pytest.mark.parametrize("kind", ["identical", "orthogonal", "cancelling"])
@every_layer
def test_one_record_contributes_at_most_the_bound(
    contribution, randomized, rows, make, shape, kind
):
    """Three draws of 1e6 times the others' size; the norm of what they add, in float64."""
    layer, bound = randomized(make()), 0.7
    for norm in contribution(
        layer, rows(N * 3, *shape), draws=3, kind=kind, scale=1e6, max_grad_norm=bound
    ):
        assert 0.99 * bound < norm <= bound * (1 - 2**-24)


@pytest.mark.parametrize("kind", ["identical", "orthogonal", "cancelling"])
def test_one_record_contributes_at_most_the_bound_to_an_embedding(contribution, randomized, kind):
    ids = torch.randint(5, (N * 3, 2), generator=torch.Generator().manual_seed(0))
    for norm in contribution(
        randomized(nn.Embedding(5, 8)), ids, draws=3, kind=kind, scale=1e6, max_grad_norm=0.7
    ):
        assert 0.99 * 0.7 < norm <= 0.7 * (1 - 2**-24)


class Twice(nn.Module):
    """Every layer runs twice, and two share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.norm = nn.LayerNorm(5)
        self.group_norm = nn.GroupNorm(1, 3)
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.head = nn.Linear(5, 6)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.norm(self.embedding(ids)) + self.embedding(ids.flip(1))
        x = self.group_norm(torch.sin(self.conv(self.conv(x))))
        logits = self.head(self.norm(self.group_norm(x)))
        return logits.sin() + self.head(x)


@pytest.mark.parametrize("draws", [1, 3])
def test_layers_used_twice_and_tied_weights_add_up(compare, randomized, draws):
    ids = torch.randint(6, (N * draws, 3), generator=torch.Generator().manual_seed(0))
    grads = compare(randomized(Twice()), ids, draws=draws)
    assert len(grads) == 8


def test_two_linear_layers_with_one_weight_add_up(compare, randomized, rows):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert len(compare(randomized(module), rows(2 * N, 4), draws=2)) == 3


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.used(input=x)  # torch's layers name their argument so


def test_an_unused_parameter_has_zero_gradients(compare, randomized, rows):
    module = randomized(Partly())
    compare(module, rows(2 * N, 4), draws=2, unused=("unused.weight", "unused.bias"))


def test_modules_to_save_of_peft(compare, randomized, rows):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 5))
    model.add_module("norm", nn.LayerNorm(5))
    model.add_module("head", nn.Linear(5, 3))
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["norm", "head"])
    model = get_peft_model(model, config)
    assert len(compare(randomized(model), rows(2 * N, 6), draws=2)) == 6


class Standardised(nn.Conv2d):
    """Inherits the forward of a convolution and computes another one."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(
            x, weight / weight.flatten(1).norm(dim=1)[:, None, None, None], bias
        )


def test_a_subclass_with_another_convolution(compare, randomized, rows):
    compare(randomized(Standardised(2, 3, 3)), rows(2 * N, 2, 4, 4), draws=2)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight.sin() * self.scale.exp()


@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrised_weight(compare, randomized, rows, bias):
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].bias.requires_grad_(bias)
    register_parametrization(module[0], "weight", Scaled())
    grads = compare(randomized(module), rows(2 * N, 4), draws=2)
    assert len(grads) == 4 + bias


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.BatchNorm1d(4)), "'0' is a BatchNorm1d.*replace it by GroupNorm"),
        (nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "'0' has max_norm.* set it to None"),
        (nn.Sequential(nn.Embedding(4, 4, scale_grad_by_freq=True)), "scale_grad_by_freq.*False"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), r"'1' has dropout 0\.1.*set its p to 0"),
    ],
)
def test_a_layer_that_mixes_records_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        Capture(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes_is_refused(norm):
    model = nn.Sequential(getattr(nn.utils, norm)(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match=r"'0' computes its weight in a hook.*parametrizations"):
        Capture(model)
