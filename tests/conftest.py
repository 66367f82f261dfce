"""Small models and data that several test files share.

Imports stay inside the fixtures: the kernels' tests run where there is only torch and triton.
"""

import itertools
import os
import signal
from importlib.util import find_spec
from pathlib import Path

# Workers of pytest-xdist share the cores: more threads in each, and in the processes it starts,
# would wait for one another. Read when numpy and torch are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    from dpengine.threads import sleep_soon

    sleep_soon()  # as the commands do

import numpy as np
import pytest
import torch

# Triton reads this when a kernel is defined, so it comes before anything that may define one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch import nn

_NUMBERS = itertools.count()
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def tiny_unet() -> nn.Module:
    """A UNet of 8x8 images with self- and cross-attention, random weights."""
    from diffusers import UNet2DConditionModel

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
    from dpengine.models import adapter

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


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter prepares a device function once in a kernel's run, not at each call.

    It replaces the functions of `triton.language` each time, by what stands there since the first.
    """
    if find_spec("triton") is None:  # not on Linux
        yield
        return
    from triton.runtime import interpreter

    prepare, run, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(function):
        if function not in prepared:
            prepared.add(function)
            return prepare(function)

    def run_kernel(executor, *args, **kwargs):
        prepared.clear()  # after each kernel the language is as it was
        return run(executor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", run_kernel)
        yield


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    """Calibrations of one test are unknown to the next and to the user."""
    cache = tmp_path_factory.getbasetemp() / "caches" / str(next(_NUMBERS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def private_npz(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    np.savez(tmp_path / "private.npz", images=images, labels=np.arange(24) % 10)
    return tmp_path / "private.npz"


@pytest.fixture
def arguments(private_npz, tmp_path) -> list[str]:
    """A run of seconds: three steps, two draws, forty images."""
    return (
        f"--data {private_npz} --num-steps 3 --draws-per-record 2 --physical-batch-size 8 "
        f"--num-synthetic 40 --sampler-steps 2 --delta 1e-3 --output {tmp_path / 'run'}"
    ).split()


@pytest.fixture
def run(tmp_path):
    from dpengine.run.folder import RunFolder

    return RunFolder(tmp_path / "run")
