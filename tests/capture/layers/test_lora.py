"""LoRA on each kind of layer against single records in float64, and what it refuses."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpengine import Capture

N = 4

LAYERS = {
    "linear 2-D": (lambda: nn.Linear(5, 7), (5,)),
    "linear 3-D": (lambda: nn.Linear(9, 4), (6, 9)),
    "linear 4-D": (lambda: nn.Linear(3, 5, bias=False), (2, 3, 3)),
    "GPT-2's Conv1D": (lambda: Conv1D(7, 5), (6, 5)),
    "conv1d of size 1": (lambda: nn.Conv1d(3, 5, 1), (3, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (3, 9)),
    "conv2d of size 1": (lambda: nn.Conv2d(4, 6, 1, dilation=2), (4, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (3, 6, 5)),
    "conv2d strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 7)),
    "conv2d uneven": (lambda: nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 5, 7)),
}

every_layer = pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)


def adapted(make, config=LoraConfig, **options) -> nn.Module:
    """The layer in a module, with an adapter whose scaling is not 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if config is LoraConfig:
            options = {"r": 2, "lora_alpha": 3.0} | options
        module = nn.Sequential(make if isinstance(make, nn.Module) else make())
        if isinstance(module[0], Conv1D):
            options["fan_in_fan_out"] = True
        return inject_adapter_in_model(config(target_modules=["0"], **options), module)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("rank", [1, 4])
@every_layer
def test_both_factors(compare, randomized, rows, make, shape, rank, draws):
    module = randomized(adapted(make, r=rank, lora_alpha=0.6))
    assert len(compare(module, rows(N * draws, *shape), draws=draws)) == 2


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@every_layer
def test_one_factor_alone(compare, randomized, rows, make, shape, frozen, draws):
    module = randomized(adapted(make))
    getattr(module[0], frozen).requires_grad_(False)
    assert len(compare(module, rows(N * draws, *shape), draws=draws)) == 1


@every_layer
def test_an_input_that_needs_no_gradient(compare, randomized, rows, make, shape):
    module = randomized(adapted(make))
    compare(module, rows(N * 2, *shape), draws=2, call=lambda module, x: module(x.detach()))


@pytest.mark.parametrize("kind", ["identical", "orthogonal", "cancelling"])
@every_layer
def test_one_record_contributes_at_most_the_bound(
    contribution, randomized, rows, make, shape, kind
):
    """Three draws of 1e6 times the others' size; the norm of what they add, in float64."""
    module, bound = randomized(adapted(make)), 0.7
    for norm in contribution(
        module, rows(N * 3, *shape), draws=3, kind=kind, scale=1e6, max_grad_norm=bound
    ):
        assert 0.99 * bound < norm <= bound * (1 - 2**-24)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"r": 3, "rank_pattern": {"0": 5}}])
def test_other_scalings_and_ranks(compare, randomized, rows, options):
    compare(randomized(adapted(lambda: nn.Linear(4, 4), **options)), rows(N, 4))


def test_a_strided_input(compare, randomized, rows):
    compare(
        randomized(adapted(lambda: nn.Linear(6, 5))),
        rows(N * 2, 6, 3),
        draws=2,
        call=lambda module, x: module(x.mT),
    )


def test_channels_last(compare, randomized, rows):
    compare(
        randomized(adapted(lambda: nn.Conv2d(4, 4, 3))),
        rows(N * 2, 4, 6, 5),
        draws=2,
        call=lambda module, x: module(x.to(memory_format=torch.channels_last)),
    )


def test_a_layer_used_twice_adds_up(compare, randomized, rows):
    compare(
        randomized(adapted(lambda: nn.Conv2d(3, 3, 3, padding=1))),
        rows(N * 2, 3, 4, 4),
        draws=2,
        call=lambda module, x: _twice(module, x),
    )


def _twice(module, x):
    return module(module(x).sin())


def test_the_scaling_is_that_of_the_call(randomized, rows):
    module, x = randomized(adapted(lambda: nn.Linear(4, 3))), rows(N, 4)
    Capture(module)
    module[0].set_scale("default", 0.3)
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(module(x), expected)


def test_disabled_adapters_run_the_base(randomized, rows):
    module, x = randomized(adapted(lambda: nn.Linear(4, 3))), rows(N, 4)
    Capture(module)
    module[0].enable_adapters(False)
    assert torch.equal(module(x), module[0].base_layer(x))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_of_another_layer_leaves_this_one_alone(randomized, rows):
    """PEFT runs the base of a layer that lacks the active adapter."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name, target in (("first", "0"), ("second", "1")):
        config = LoraConfig(r=2, target_modules=[target])
        module = inject_adapter_in_model(config, module, adapter_name=name)
    randomized(module)
    for layer in module:
        layer.set_adapter("first")
    capture, x = Capture(module), rows(N, 4)
    for layer in module:
        layer.requires_grad_(True).set_adapter("second")
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(module(x), expected)
    assert capture


def _merged(layer):
    layer.merge()


def _two_active(layer):
    layer.update_layer("other", r=1, lora_alpha=1, config=LoraConfig())
    layer.set_adapter(["default", "other"])


def _trainable_base(layer):
    layer.base_layer.bias.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    "make, options, message",
    [
        (nn.Linear(4, 4), {"use_dora": True}, "'0' uses the LoRA variant.*use_dora.*to False"),
        (nn.Conv2d(4, 4, 3), {"use_dora": True}, "'0' uses the LoRA variant"),
        (nn.Linear(4, 4), {"lora_bias": True}, "'0' has a LoRA bias.*set lora_bias=False"),
        (nn.Linear(4, 4), {"lora_dropout": 0.1}, r"dropout 0\.1.*set"),
        (nn.Linear(4, 4), {"bias": "lora_only"}, "'0' trains its base bias.*requires_grad_"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, "'0' is LoRA over a convolution.*2 groups.*remove it"),
        (nn.Conv2d(4, 4, 3, padding="same"), {}, "padding 'same'.*remove it from target_modules"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), {}, "mode 'circular'"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(make, options, message):
    module = adapted(make, **options)
    with pytest.raises(ValueError, match=message):
        Capture(module)


@pytest.mark.parametrize(
    "make, config, message",
    [
        (
            nn.Embedding(4, 4),
            LoraConfig,
            r"'0' is a peft\.tuners\.lora.*\.Embedding over a Embedding",
        ),
        (nn.Linear(4, 4), LoHaConfig, r"'0' is a peft\.tuners\.loha.*use LoraConfig"),
        (nn.Linear(4, 4), IA3Config, r"'0' is a peft\.tuners\.ia3.*use LoraConfig"),
    ],
)
def test_other_tuners_are_refused_by_name(make, config, message):
    options = {"feedforward_modules": []} if config is IA3Config else {}
    with pytest.raises(TypeError, match=message):
        Capture(adapted(make, config, **options))


def test_an_input_of_another_type_than_the_base_is_refused(rows):
    module = adapted(lambda: nn.Linear(4, 4)).train()
    module[0].base_layer.bfloat16()
    Capture(module)
    with pytest.raises(TypeError, match=r"float32 input for a torch\.bfloat16 base.*autocast"):
        module(rows(N, 4))
