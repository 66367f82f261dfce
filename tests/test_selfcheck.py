"""The checks before training find what they are for, on a model that is broken on purpose."""

import pytest
import torch
from torch import nn

from dpengine import Capture, PrivacyError, selfcheck

DRAWS, RECORDS = 2, 3


def losses_of(unet, tokens: int = 2, n_records: int = RECORDS):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(n_records * DRAWS, 1, 8, 8, generator=generator)
    states = torch.randn(n_records * DRAWS, tokens, 8, generator=generator)

    def losses(rows: slice) -> torch.Tensor:
        output = unet(sample[rows], 10, encoder_hidden_states=states[rows]).sample
        return output.square().flatten(1).mean(1)

    return losses


class MixesRecords(nn.Module):
    """Subtracts the mean over the batch: record i's output depends on record j."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


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


def test_a_module_that_mixes_records_is_refused(lora_unet):
    lora_unet.conv_norm_out = MixesRecords()
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    with pytest.raises(PrivacyError, match="mixes the records"):
        selfcheck.check_per_record_grads(capture, losses_of(lora_unet), RECORDS)


def test_a_use_that_bypasses_the_layer_is_refused(lora_unet):
    """A LoRA factor that also enters the loss directly has a gradient its rule does not see."""
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    plain, factor = losses_of(lora_unet), capture.parameters[0]
    with pytest.raises(PrivacyError):
        selfcheck.check_per_record_grads(
            capture, lambda rows: plain(rows) + factor.square().sum(), RECORDS
        )


def test_a_wrong_rule_is_refused(lora_unet, monkeypatch):
    from dpengine.kernels import ops

    right = ops.lora_side_a

    def wrong(*args, **kwargs):
        grad_a, sq_norms = right(*args, **kwargs)
        return 1.01 * grad_a, sq_norms

    monkeypatch.setattr(ops, "lora_side_a", wrong)
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    with pytest.raises(PrivacyError, match=r"lora_A.* differs from that of its record"):
        selfcheck.check_per_record_grads(capture, losses_of(lora_unet), RECORDS)


def test_a_batch_shape_whose_slots_round_alike_passes(lora_unet):
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    selfcheck.check_slots(capture, losses_of(lora_unet, n_records=8), 8)


def test_a_gradient_that_depends_on_its_slot_is_refused(lora_unet):
    """One unit in the last place, in the first slot alone."""
    capture = Capture(lora_unet, draws_per_record=DRAWS)
    plain = losses_of(lora_unet, n_records=8)

    def losses(rows):
        return plain(rows) * torch.tensor([1 + 2**-23] + [1.0] * (8 * DRAWS - 1))

    with pytest.raises(ValueError, match="place in the batch"):
        selfcheck.check_slots(capture, losses, 8)


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
