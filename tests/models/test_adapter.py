"""Adding a LoRA adapter by PEFT."""

import pytest
import torch

from dpengine.models import adapter


def trainable(unet) -> dict[str, torch.Tensor]:
    return {name: param for name, param in unet.named_parameters() if param.requires_grad}


def test_only_the_factors_of_the_named_layers_are_trainable(tiny_unet):
    adapter.add_lora(tiny_unet, rank=2, alpha=4.0, target_modules=("to_q", "to_out.0"), seed=0)
    names = trainable(tiny_unet)
    assert len(names) == 2 * 2 * 8
    assert all("lora_" in name and (".to_q." in name or ".to_out.0." in name) for name in names)
    assert all(param.dtype == torch.float32 for param in names.values())


def test_a_new_adapter_changes_no_output(tiny_unet):
    inputs = torch.randn(2, 1, 8, 8), 3, torch.randn(2, 2, 8)
    base = tiny_unet(*inputs).sample
    adapter.add_lora(tiny_unet, rank=2, alpha=4.0, target_modules=("to_q",), seed=0)
    torch.testing.assert_close(tiny_unet(*inputs).sample, base)


def test_the_seed_alone_decides_the_initial_weights(tiny_unet):
    import copy

    unets = [copy.deepcopy(tiny_unet) for _ in range(3)]
    for unet, seed in zip(unets, (0, 0, 1), strict=True):
        torch.rand(5)
        adapter.add_lora(unet, rank=2, alpha=2.0, target_modules=("to_v",), seed=seed)
    first, again, other = (trainable(unet) for unet in unets)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_global_generator_is_left_alone(tiny_unet):
    state = torch.random.get_rng_state()
    adapter.add_lora(tiny_unet, rank=2, alpha=2.0, target_modules=("to_v",), seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("target", ["to_out.Linear", "o_q", "q", "norm1", ""])
def test_a_target_that_matches_no_layer_is_refused(tiny_unet, target):
    with pytest.raises(ValueError, match=r"exist are .*to_k, to_out\.0, to_q, to_v"):
        adapter.add_lora(tiny_unet, rank=2, alpha=2.0, target_modules=("to_q", target), seed=0)


def test_the_same_adapter_is_the_same_file(lora_unet, tmp_path):
    """The ledger's seal has its digest; safetensors writes metadata in an order of chance."""
    contents = set()
    for _ in range(8):
        adapter.save_lora(lora_unet, tmp_path)
        contents.add((tmp_path / adapter.WEIGHTS_FILE).read_bytes())
    assert len(contents) == 1
