"""Times of the ops on a GPU, beside eager PyTorch, Opacus' formulas and a plain copy."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dpengine.kernels import ops

from .. import layers, shapes
from ..shapes import LAYERS, MODELS, Shape

DEVICE = "cuda"
CACHE_BYTES = 256 * 2**20
"""Calls take turns on inputs of this size together, so that none finds its own in the cache."""

N_VALUES = shapes.N_VALUES["sd15_512"]


def microseconds(calls: list[Callable[[], Any]], seconds: float = 0.03) -> float:
    """Median time of one call, from replays of a CUDA graph of all ``calls``.

    Several replays lie between two events, so that the time to launch a graph hardly counts.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replays = max(2, 64 // len(calls))
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / (replays * len(calls)))
    return sorted(times)[len(times) // 2]


@cache
def copy_microseconds(n_bytes: int) -> float:
    """Time of an elementwise kernel that reads and writes ``n_bytes`` in all."""
    size = max(64, n_bytes // 8)
    pairs = [
        [torch.ones(size, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        for _ in range(_n_sets(n_bytes))
    ]
    return microseconds([partial(torch.bitwise_not, pair[0], out=pair[1]) for pair in pairs])


def _n_sets(n_bytes: int) -> int:
    return max(2, min(512, CACHE_BYTES // max(n_bytes, 1) + 1))


def layer_calls(op: str, impl: str, shape: Shape, dtype: torch.dtype) -> tuple[list[Callable], int]:
    """Calls of one op on several sets of inputs, and the bytes that one must move."""
    run, one = layers.caller(op, impl), layers.make_inputs(op, shape, dtype, DEVICE)
    n_bytes = layers.bytes_of(op, one)
    more = [layers.make_inputs(op, shape, dtype, DEVICE) for _ in range(_n_sets(n_bytes) - 1)]
    return [partial(run, inputs) for inputs in (one, *more)], n_bytes


def measure_op(op: str, impl: str, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    calls, n_bytes = layer_calls(op, impl, shape, dtype)
    taken = microseconds(calls)
    del calls
    copy = copy_microseconds(n_bytes)
    return {
        "us": taken,
        "gb_per_s": n_bytes / taken / 1e3,
        "share_of_copy": copy / taken,
        "bytes": n_bytes,
    }


def measure_slab(op: str, impl: str, n_records: int) -> dict[str, float]:
    """Norms or the clipped sum over a slab of SD 1.5's gradients."""
    slabs = [torch.randn(n_records, N_VALUES, device=DEVICE) for _ in range(3)]
    norms = slabs[0].double().square().sum(1)
    keep = torch.ones(n_records, dtype=torch.bool, device=DEVICE)
    weights = torch.rand(n_records, device=DEVICE)

    def call(slab: Tensor) -> None:
        if impl == "opacus" and op == "sq_norms":
            slab.norm(dim=1)
        elif impl == "opacus":
            torch.einsum("i,i...", weights, slab)
        elif op == "sq_norms":
            ops.sq_norms([slab], impl="triton" if impl == "triton" else "reference")
        else:
            kind = "triton" if impl == "triton" else "reference"
            ops.clip_and_sum([slab], norms, keep, max_grad_norm=1.0, impl=kind)

    taken = microseconds([lambda slab=slab: call(slab) for slab in slabs])
    copy = copy_microseconds(slabs[0].nbytes)
    return {"us": taken, "gb_per_s": slabs[0].nbytes / taken / 1e3, "share_of_copy": copy / taken}


def measure_noise() -> dict[str, float]:
    """Noise for SD 1.5 at rank 4, beside its instructions' roofline and `torch.randn`."""
    total = torch.zeros(N_VALUES, dtype=torch.float64, device=DEVICE)
    stream = torch.arange(12, dtype=torch.int32, device=DEVICE)
    taken = microseconds(
        [lambda: ops.add_noise(total, stream, noise_stddev=1.0, divisor=1.0, impl="triton")] * 8
    )
    randn = microseconds([lambda: torch.randn(N_VALUES, device=DEVICE)] * 8)
    # ChaCha20 takes 976 integer instructions for a block of eight normals; Box-Muller is taken to
    # need 130 in float64 for a pair. The two kinds run beside each other.
    roofline = 1e6 * max(N_VALUES / 8 * 976, N_VALUES / 2 * 130) / _integer_rate()
    return {"us": taken, "randn_us": randn, "roofline_us": roofline, "share": roofline / taken}


def _integer_rate() -> float:
    """Integer, and as many float64, instructions a second: 64 a clock and multiprocessor."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000)  # kHz; an H200's, where torch tells none
    return 64 * properties.multi_processor_count * 1e3 * clock


def measure_step(batch: int) -> dict[str, float]:
    """All per-record work of one SD 1.5 step: both sides of each layer, norms, clip, sum, noise.

    Norms and clipped sum are timed as the engine calls them, one tensor after another.
    """
    parts = {"lora_forward": 0.0, "lora_side_b": 0.0, "lora_side_a": 0.0}
    grads = []
    for layer, count in MODELS["sd15_512"].items():
        shape = replace(LAYERS[layer], n_records=batch)
        for op in parts:
            calls, _ = layer_calls(op, "triton", shape, torch.bfloat16)
            parts[op] += count * microseconds(calls)
        for size in (shape.in_features, shape.out_features) * count:
            grads.append(torch.randn(batch, shape.rank * size, device=DEVICE))
    norms = ops.sq_norms(grads, impl="triton")
    keep = norms > 0
    clip = partial(ops.clip_and_sum, grads, norms, keep, max_grad_norm=1.0, impl="triton")
    parts["sq_norms"] = microseconds([partial(ops.sq_norms, grads, impl="triton")])
    parts["clip_and_sum"] = microseconds([clip])
    parts["add_noise"] = measure_noise()["us"]
    return {**parts, "per_record_us": sum(parts.values()) - parts["lora_forward"]}


def measure_unet(batch: int) -> dict[str, float]:
    """The UNet's own forward and backward, to which the per-record work is to be compared."""
    return {"unet_us": _unet_microseconds(batch)}


def _unet_microseconds(batch: int) -> float:
    from diffusers import UNet2DConditionModel

    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        ).to(torch.bfloat16)
    unet.requires_grad_(False)
    latents = torch.randn(batch, 4, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    tokens = torch.randn(batch, 77, 768, device=DEVICE, dtype=torch.bfloat16)
    timesteps = torch.arange(batch, device=DEVICE)
    # As with LoRA: gradients of the inputs all the way, none of the frozen weights.
    latents.requires_grad_()

    def step() -> None:
        unet(latents, timesteps, tokens).sample.float().square().mean().backward()
        latents.grad = None

    step()
    times = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return sorted(times)[2]
