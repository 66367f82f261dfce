"""What a peer trains: models made of code, a loss and random rows; one step of it, measured.

A step is forward, backward, clipping, noise and update on one batch of random rows. Weights are
random: nothing is fetched.
"""

import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import Optimizer

from dpengine.execution.passes import How

from .peers import (
    HOOKS,
    MAX_GRAD_NORM,
    NON_PRIVATE,
    OURS,
    PEERS,
    Loss,
    Setup,
    Start,
    Training,
)

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
IMPLS = (NON_PRIVATE, OURS, HOOKS)
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Task:
    """A model and a loss for it.

    ``make_model()`` gives the same model each time, its adapter's factors random and not zero;
    ``loss(model, *inputs(n_rows))`` is the mean of the ``row_losses``.
    """

    make_model: Callable[[], nn.Module]
    loss: Loss
    row_losses: Loss
    inputs: Callable[[int], tuple[Tensor, ...]]


def start(
    task: Task,
    impl: str,
    make_optimizer: MakeOptimizer,
    n_records: int,
    *,
    draws: int = 1,
    how: How = "eager",
    **mechanism: float,
) -> Training:
    """A fresh model of ``task``, trained by ``impl`` on batches of ``n_records · draws`` rows.

    mechanism: ``noise_multiplier`` and ``max_grad_norm``, where they are not the usual ones.
    """
    peer = PEERS[impl if how == "eager" else f"{impl} {how}"]
    return begin(task, peer, make_optimizer, n_records, draws=draws, **mechanism)


def begin(
    task: Task,
    peer: Start,
    make_optimizer: MakeOptimizer,
    n_records: int,
    *,
    draws: int = 1,
    noise_multiplier: float = 1.0,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> Training:
    """As ``start``, for any peer."""
    module = task.make_model().train()
    optimizer = make_optimizer([param for param in module.parameters() if param.requires_grad])
    losses = task.loss, task.row_losses
    return peer(
        Setup(module, *losses, optimizer, n_records, noise_multiplier, draws, max_grad_norm)
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions of a GPU in float32 as it is, not in TF32: for results, not for times."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def quiet() -> Iterator[None]:
    """Opacus warns of its hooks and of its generator, which is not secure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def add_lora(
    unet: nn.Module, rank: int, targets: tuple[str, ...] = TARGETS, base: torch.dtype | None = None
) -> nn.Module:
    """The UNet, frozen and cast to ``base``, with a float32 adapter."""
    unet.requires_grad_(False)
    for param in unet.parameters():
        param.data = param.data.to(base)
    # Both factors are random then: with lora_b zero, lora_a would have no gradient.
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False
    )
    inject_adapter_in_model(config, unet)
    for param in unet.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return unet


def small(
    rank: int = 4, size: int = 16, targets: tuple[str, ...] = TARGETS, device: str = "cpu"
) -> Task:
    """A UNet of seven attention layers, 56 LoRA tensors, on images of ``size`` pixels a side."""
    make = partial(
        UNet2DModel,
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        norm_num_groups=8,
    )

    def make_model() -> nn.Module:
        with torch.device(device):
            return add_lora(make(), rank, targets)

    return _task(make_model, (3, size, size), {}, device, None)


def _celeba() -> nn.Module:
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 512),
        down_block_types=("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3,
    )


def _sd15() -> nn.Module:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


@dataclass(frozen=True)
class Model:
    """A UNet without its adapter, the size of a row, and what else a row is made of."""

    make: Callable[[], nn.Module]
    row: tuple[int, ...]
    extras: dict[str, tuple[int, ...]]
    batch: int


MODELS = {
    "celeba_64": Model(_celeba, (3, 32, 32), {}, 64),
    "sd15_512": Model(_sd15, (4, 64, 64), {"encoder_hidden_states": (77, 768)}, 16),
    "sdxl_1024": Model(
        _sdxl,
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        4,
    ),
}
"""UNets whose adapted layers are those of ``shapes.MODELS``; the batch is one to be timed.

The first is the latent UNet of arXiv 2406.01355 for CelebA-64, with separate q, k and v layers.
"""

_TINY = Model(
    lambda: UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    (4, 8, 8),
    {"encoder_hidden_states": (5, 8)},
    2,
)


def models(device: str) -> dict[str, Model]:
    """What is trained on a device: a CPU shows that everything runs, on a tiny UNet."""
    return MODELS if device == "cuda" else {"tiny": _TINY}


def impls(device: str) -> list[tuple[str, How]]:
    """What is compared on a device; Opacus where it is installed."""
    graphed: list[tuple[str, How]] = [("dpengine", "cuda-graph")] if device == "cuda" else []
    return [*((impl, "eager") for impl in installed()), *graphed]


def installed() -> tuple[str, ...]:
    """The implementations that can run here."""
    return IMPLS if importlib.util.find_spec("opacus") else IMPLS[:2]


def model_task(model: Model, device: str, rank: int = 4) -> Task:
    """Training of ``model`` over a bfloat16 base under autocast, with a float32 adapter."""

    def make() -> nn.Module:
        with torch.device(device):
            return add_lora(model.make(), rank, base=torch.bfloat16)

    return _task(make, model.row, model.extras, device, torch.bfloat16)


def measure_step(
    model: str, impl: str, how: How, device: str, rounds: int = 10
) -> dict[str, float]:
    """Median time of a step with AdamW, images a second, and on a GPU the peak of its memory."""
    batch = models(device)[model].batch
    task = model_task(models(device)[model], device)
    with quiet(), _emptied(device):
        training, inputs = start(task, impl, adamw, batch, how=how), task.inputs(batch)
        for _ in range(3):
            training.step(*inputs)
        times = [_seconds(lambda: training.step(*inputs), device) for _ in range(rounds)]
        seconds = median(times)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"ms": 1e3 * seconds, "images_per_s": batch / seconds, "peak_gib": peak / 2**30}


def largest_batch(model: str, impl: str, device: str) -> dict[str, int]:
    """The largest power of two whose step with AdamW fits the device's memory.

    On a CPU, which would swap, at most the batch to be timed.
    """
    task, best, batch = model_task(models(device)[model], device), 0, 1
    at_most = 4096 if device == "cuda" else models(device)[model].batch
    with quiet(), _emptied(device):
        training = start(task, impl, adamw, 1)
        while batch <= at_most:
            try:
                training.step(*task.inputs(batch))
            except torch.OutOfMemoryError:
                break
            best, batch = batch, 2 * batch
    return {"largest_batch": best}


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, foreach=True)


def _task(
    make: Callable[[], nn.Module],
    row: tuple[int, ...],
    extras: dict[str, tuple[int, ...]],
    device: str,
    half: torch.dtype | None,
) -> Task:
    """Predict one random target from random rows; ``half`` is the type that autocast computes in.

    Of ``extras``, `text_embeds` and `time_ids` go into SDXL's ``added_cond_kwargs``.
    """

    def make_model() -> nn.Module:
        with torch.random.fork_rng(["cuda"] if device == "cuda" else []):
            torch.manual_seed(0)
            return make()

    def inputs(n_rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(1)
        shapes = [row, row, *extras.values()]
        noise = [torch.randn(n_rows, *s, generator=generator, device=device) for s in shapes]
        return noise[0], torch.arange(n_rows, device=device) * 37 % 1000, *noise[1:]

    def predict(model: nn.Module, x: Tensor, timesteps: Tensor, *more: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(extras, more, strict=True))
        added = {name: named.pop(name) for name in ("text_embeds", "time_ids") if name in named}
        if added:
            named["added_cond_kwargs"] = added
        with torch.autocast(device, half, enabled=half is not None):
            output = model(x, timesteps, **named).sample
        return output if half is None else output.float()

    def loss(model: nn.Module, x: Tensor, timesteps: Tensor, target: Tensor, *more: Tensor):
        return F.mse_loss(predict(model, x, timesteps, *more), target)

    def row_losses(model: nn.Module, x: Tensor, timesteps: Tensor, target: Tensor, *more: Tensor):
        squares = F.mse_loss(predict(model, x, timesteps, *more), target, reduction="none")
        return squares.flatten(1).mean(1)

    return Task(make_model, loss, row_losses, inputs)


def _seconds(run: Callable[[], None], device: str) -> float:
    start_time = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


@contextmanager
def _emptied(device: str) -> Iterator[None]:
    """The device's memory without what earlier measurements have left in the cache."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    yield
