"""GPT-2 of transformers, whose linear layers keep their weight transposed and share positions."""

import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel

from dpengine import Capture, PrivacyError

N, T = 3, 5


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).train()


def call(model, ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def tokens(n_rows: int) -> torch.Tensor:
    return torch.randint(11, (n_rows, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("trained", ["adapters", "all weights"])
def test_every_trained_tensor_has_the_gradients_of_single_records(
    compare, randomized, trained, draws
):
    model = gpt2()
    if trained == "adapters":
        config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = inject_adapter_in_model(config, model)
    grads = compare(randomized(model), tokens(N * draws), draws=draws, call=call)
    assert len(grads) == (6 if trained == "adapters" else 16)


def test_positions_that_all_rows_share_are_refused_with_the_way_out():
    model = gpt2()
    Capture(model)
    with pytest.raises(PrivacyError, match=r"'transformer\.wpe'.* expand .*position_ids of \[1, T"):
        model(input_ids=tokens(N), use_cache=False)
