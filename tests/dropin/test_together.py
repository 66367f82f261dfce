"""Several modules trained as one: a record's gradient over all of them, and what is refused."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import Capture, PrivacyEngine, PrivacyError, Together

N, T = 5, 3


def text_encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 8))


def predict(parts, noisy, timesteps, tokens):
    states = parts.text_encoder(tokens)
    return parts.unet(noisy, timesteps, encoder_hidden_states=states).sample


def inputs(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(n, 1, 8, 8, generator=generator),
        torch.randint(1000, (n,), generator=generator),
        torch.randint(7, (n, T), generator=generator),
    ]


@pytest.fixture
def both(lora_unet) -> Together:
    encoder = text_encoder().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["2"], init_lora_weights=False), encoder)
    return Together(predict, unet=lora_unet, text_encoder=encoder).train()


def test_the_gradients_are_those_of_single_records_through_all_parts(both):
    x = inputs(N)
    trained = [param for param in both.parameters() if param.requires_grad]
    alone = []
    for i in range(N):
        predict(both, *(leaf[i : i + 1] for leaf in x)).square().mean().backward()
        alone.append([param.grad.clone() for param in trained])
        both.zero_grad()
    capture = Capture(both)
    both(*x).square().flatten(1).mean(1).sum().backward()
    assert len(capture.per_record_grads) == len(trained)
    for number, grads in enumerate(capture.per_record_grads):
        expected = torch.stack([of_one[number] for of_one in alone])
        assert expected.any()
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_the_parts_are_trained_privately_and_stay_what_they_were(both):
    unet, encoder = both.unet, both.text_encoder
    assert both.text_encoder is encoder and {
        n.split(".")[0] for n, _ in both.named_parameters()
    } == {
        "unet",
        "text_encoder",
    }
    trained = [param for param in both.parameters() if param.requires_grad]
    before = [param.detach().clone() for param in trained]
    module, optimizer, loader = PrivacyEngine().make_private(
        module=both,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(*inputs(N)), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert module is both
    for x in loader:
        module(*x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((param != start).any() for param, start in zip(trained, before, strict=True))
    assert type(unet).__name__ == "UNet2DConditionModel" and both.unet is unet


def test_a_part_that_is_called_by_itself_is_refused(both):
    Capture(both)
    with pytest.raises(PrivacyError, match="outside a forward pass of the captured module"):
        both.text_encoder(inputs(N)[2])


@pytest.mark.parametrize(
    ("call", "parts", "words"),
    [
        (nn.Linear(2, 2), {}, "give the modules by name, as unet=unet"),
        (predict, {}, "parts must be given by name"),
        (predict, {"unet": [nn.Linear(2, 2)]}, "unet must be an nn.Module, got list"),
        (predict, {"forward": nn.Linear(2, 2)}, "a part cannot be named 'forward'"),
    ],
)
def test_what_is_not_a_call_of_named_modules_is_refused(call, parts, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Together(call, **parts)
