"""Small models and data that several test files share."""

import signal

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dpengine import adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """A UNet of 8x8 images with self- and cross-attention, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )


@pytest.fixture
def lora_unet(tiny_unet) -> nn.Module:
    """The same with an adapter whose lora_b is not zero, so that both factors have gradients."""
    adapter.add_lora(tiny_unet, rank=2, alpha=3.0, target_modules=TARGETS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, param in tiny_unet.named_parameters():
        if "lora_B" in name:
            param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return tiny_unet.train()


@pytest.fixture(autouse=True, scope="session")
def ordinary_signals():
    """Signals that `nohup` or a background job ignores are those that the tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    """Calibrations of one test are unknown to the next and to the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
