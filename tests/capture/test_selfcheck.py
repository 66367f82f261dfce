"""The checks before training find what they are for, on a model that is broken on purpose."""

import pytest
import torch
from torch import nn

from dpengine import Capture, PrivacyError
from dpengine.capture import selfcheck

DRAWS, RECORDS = 2, 3


def losses_of(unet, tokens: int = 2, n_records: int = RECORDS):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(n_records * DRAWS, 1, 8, 8, generator=generator)
    states = torch.randn(n_records * DRAWS, tokens, 8, generator=generator)

    def losses(rows: slice) -> torch.Tensor:
        output = unet(sample[rows], 10, encoder_hidden_states=states[rows]).sample
        return output.square().flatten(1).mean(1)

    return losses


def test_a_sound_model_passes_and_keeps_its_weights(lora_unet):
    before = [param.detach().clone() for param in lora_unet.parameters()]
    assert selfcheck.freeze_inert_tensors(lora_unet, losses_of(lora_unet)) == []
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    selfcheck.check_per_record_grads(capture, losses_of(lora_unet), RECORDS)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_unet.parameters(), strict=True))
    assert all(param.grad is None for param in lora_unet.parameters())


def test_query_and_key_of_attention_over_one_token_are_frozen(lora_unet):
    frozen = selfcheck.freeze_inert_tensors(lora_unet, losses_of(lora_unet, tokens=1))
    attentions = {
        name.split(".attn2.")[0] for name, _ in lora_unet.named_parameters() if ".attn2." in name
    }
    assert len(frozen) == 4 * len(attentions) > 0
    assert all(".attn2.to_q." in name or ".attn2.to_k." in name for name in frozen)
    named = dict(lora_unet.named_parameters())
    assert not any(named[name].requires_grad for name in frozen)
    assert all(
        param.requires_grad
        for name, param in named.items()
        if "lora" in name and name not in frozen
    )


class OwnBatchNorm(nn.Module):
    """Normalises by the moments of the batch; not torch's class, so known by what it does alone."""

    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True) + 1).sqrt()


class SubtractsTheMean(nn.Module):
    def forward(self, x):
        return x - self.mean(x)

    def mean(self, x):
        return x.mean(0, keepdim=True)


class WithInnerMean(SubtractsTheMean):
    """The mean comes from a module of its own; that one has no rows, the outer one mixes."""

    def __init__(self):
        super().__init__()
        self.mean_of = MeanOfBatch()

    def mean(self, x):
        return self.mean_of(x)


class MeanOfBatch(nn.Module):
    def forward(self, x):
        return x.mean(0, keepdim=True)


class InPlace(nn.Module):
    """Destroys its input, of which the check must have kept a copy."""

    def forward(self, x):
        return x.sub_(x.mean(0, keepdim=True))


class AttendsOverTheBatch(nn.Module):
    """Takes the rows for tokens."""

    def forward(self, x):
        tokens = x.flatten(1)[None]
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[0].view_as(x)


class Shifts(nn.Module):
    """Each row gets a little of the one before it, whose gradient then comes from two records."""

    def forward(self, x):
        return x + 0.1 * x.roll(1, 0)


class Container(nn.Module):
    """Mixes between two modules that do not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.SiLU(), nn.SiLU()

    def forward(self, x):
        x = self.first(x)
        return self.second(x + x.mean(0, keepdim=True))


MIXING = [
    OwnBatchNorm,
    SubtractsTheMean,
    WithInnerMean,
    InPlace,
    AttendsOverTheBatch,
    Shifts,
    Container,
]


class Small(nn.Module):
    """Two adapted layers around a place for a module that is broken on purpose."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.middle, self.late = middle, nn.Identity()

    def forward(self, x):
        return self.late(self.to_v(self.middle(x + self.to_q(x))))

    def add_adapter(self, config, adapter_name):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def small(middle: nn.Module) -> Small:
    from dpengine.models import adapter

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small(middle)
    adapter.add_lora(model, rank=2, alpha=3.0, target_modules=("to_q", "to_v"), seed=0)
    return model.train()


def small_losses(model):
    x = torch.randn(RECORDS * DRAWS, 3, 8, generator=torch.Generator().manual_seed(0))
    return lambda rows: (model(x[rows]) + x[rows]).square().flatten(1).mean(1)


def refusal(model, losses=None) -> str:
    """What the check says; it leaves no hook behind."""
    capture = Capture(model, draws_per_record=DRAWS)
    with pytest.raises(PrivacyError, match="differs from that of its record alone") as info:
        selfcheck.check_per_record_grads(capture, losses or small_losses(model), RECORDS)
    capture.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return str(info.value)


@pytest.mark.parametrize("mixing", MIXING)
def test_a_module_that_mixes_records_is_refused_by_name(mixing):
    text = refusal(small(mixing()))
    assert f"module 'middle', a {mixing.__name__}, mixes the records of a batch" in text
    assert "replace it" in text


def test_a_module_inside_a_unet_is_named(lora_unet):
    lora_unet.conv_norm_out = SubtractsTheMean()
    text = refusal(lora_unet, losses_of(lora_unet))
    assert "module 'conv_norm_out', a SubtractsTheMean, mixes the records" in text


def test_the_first_of_two_in_the_order_of_calls_is_named():
    model = small(Container())
    model.late = SubtractsTheMean()
    del model.middle
    model.middle = Container()  # now the last in the order of the children
    assert "module 'middle', a Container," in refusal(model)


def test_the_innermost_is_named():
    assert "module 'middle.1', a Container," in refusal(
        small(nn.Sequential(nn.SiLU(), Container(), nn.SiLU()))
    )


def test_mixing_inside_the_adapter_is_seen_off_its_initial_zero():
    """At lora_b = 0 the adapter's branch adds nothing, and a mixing in it changes no output."""
    model = small(nn.SiLU())
    model.to_v.lora_dropout["default"] = SubtractsTheMean()
    assert "module 'to_v.lora_dropout.default', a SubtractsTheMean, mixes" in refusal(model)


def test_tokens_or_heads_in_the_first_dimension_are_no_mixing():
    """[N·K·3, ...] of each row's three; only what comes after them mixes."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.SiLU()

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view_as(x)

    model = small(Flat())
    model.late = SubtractsTheMean()
    assert "module 'late', a SubtractsTheMean, mixes" in refusal(model)


def test_rows_in_another_dimension_are_laid_on_the_module_around_them():
    """In [T, N·K, ...] the rows of the others are not found; the module around it has them."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SubtractsTheMean()
            self.inner.mean = lambda x: x.mean(1, keepdim=True)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    assert "module 'middle', a Turned, mixes" in refusal(small(Turned()))


def test_a_module_that_draws_at_random_is_refused_by_name():
    """A generator of its own is not seen by the watch on torch's."""

    class Drops(nn.Module):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x * (torch.rand(x.shape, generator=self.generator) < 0.5)

    text = refusal(small(Drops()))
    assert "module 'middle', a Drops, gives other outputs for the same inputs" in text
    assert "mixes" not in text


@pytest.mark.parametrize(
    "join",
    [
        lambda losses: losses * losses.detach().mean(),
        lambda losses: losses * losses.roll(DRAWS),
        lambda losses: losses / losses.detach().norm(),
    ],
    ids=["scale", "product", "normalised"],
)
def test_a_loss_that_mixes_records_is_told_from_a_module(join):
    model = small(nn.SiLU())
    plain = small_losses(model)
    text = refusal(model, lambda rows: join(plain(rows)))
    assert "the loss mixes the records of a batch; no module does" in text
    assert "for each row alone" in text


def test_a_use_that_bypasses_the_layer_is_refused(lora_unet):
    """A LoRA factor that also enters the loss directly has a gradient its rule does not see."""
    factor = next(param for param in lora_unet.parameters() if param.requires_grad)
    plain = losses_of(lora_unet)
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    with pytest.raises(PrivacyError, match="ordinary gradient"):
        selfcheck.check_per_record_grads(
            capture, lambda rows: plain(rows) + factor.square().sum(), RECORDS
        )


def test_a_use_that_only_single_records_have_is_told_from_a_mixing():
    """Nothing mixes, and yet the batch lacks a use of the tensor that a record alone has."""
    model = small(nn.SiLU())
    plain, factor = small_losses(model), model.to_q.lora_A["default"].weight

    def losses(rows):
        bypass = factor.square().sum()
        return plain(rows) + (
            bypass.detach() if len(torch.arange(RECORDS * DRAWS)[rows]) > DRAWS else bypass
        )

    assert "where its rule does not see it" in refusal(model, losses)


def test_a_wrong_rule_is_refused(monkeypatch):
    from dpengine.kernels import ops

    right = ops.lora_side_a

    def wrong(*args, **kwargs):
        return 1.01 * right(*args, **kwargs)

    monkeypatch.setattr(ops, "lora_side_a", wrong)
    text = refusal(small(nn.SiLU()))
    assert "'to_q.lora_A.default.weight'" in text
    assert "the rule is wrong for its layer" in text


def backward_of(unet, weigh):
    """A pass over rows of (sample, states), their losses multiplied by ``weigh``."""

    def backward(rows):
        sample, states = rows["sample"], rows["states"]
        output = unet(sample, 10, encoder_hidden_states=states).sample
        (output.square().flatten(1).mean(1) * weigh).mean().backward()

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(8 * DRAWS, 1, 8, 8, generator=generator)
    states = torch.randn(8 * DRAWS, 2, 8, generator=generator)
    return backward, {"sample": sample, "states": states}


def test_a_batch_shape_whose_slots_round_alike_passes(lora_unet):
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    selfcheck.check_slots(capture, *backward_of(lora_unet, torch.ones(8 * DRAWS)))


def test_a_gradient_that_depends_on_its_slot_is_refused(lora_unet):
    """One unit in the last place, in the first slot alone."""
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    weigh = torch.tensor([1 + 2**-23] + [1.0] * (8 * DRAWS - 1))
    with pytest.raises(ValueError, match="place in the batch"):
        selfcheck.check_slots(capture, *backward_of(lora_unet, weigh))


def test_weights_that_did_not_move_are_reported(lora_unet):
    capture = Capture(lora_unet)
    before = [param.detach().clone() for param in capture.parameters]
    for param in capture.parameters[1:]:
        param.data += 1
    with pytest.raises(PrivacyError, match="did not move"):
        selfcheck.check_updated(capture, before, noise_multiplier=1.0)
    selfcheck.check_updated(capture, before, noise_multiplier=0.0)
    capture.parameters[0].data += 1
    selfcheck.check_updated(capture, before, noise_multiplier=1.0)


def test_tensors_replaced_after_capture_are_reported(lora_unet):
    capture = Capture(lora_unet)
    before = [param.detach().clone() for param in capture.parameters]
    layer = lora_unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(PrivacyError, match="no longer the captured ones"):
        selfcheck.check_updated(capture, before, noise_multiplier=1.0)
