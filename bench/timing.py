"""Times of the ops on a GPU, beside eager PyTorch, Opacus' formulas and a plain copy."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpengine.kernels import ops

from .shapes import MODELS, Shape

DEVICE = "cuda"
IMPLS = ("triton", "eager", "opacus")
CACHE_BYTES = 256 * 2**20
"""Calls take turns on inputs of this size together, so that none finds its own in the cache."""

N_VALUES = 797_184
"""Trainable parameters of SD 1.5 at rank 4."""


def microseconds(calls: list[Callable[[], Any]], seconds: float = 0.2) -> float:
    """Median time of one call, replayed from a CUDA graph of all ``calls``."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(stop) / len(calls))
    return sorted(times)[len(times) // 2]


def copy_microseconds(n_bytes: int) -> float:
    """Time of a copy that reads and writes ``n_bytes`` in all."""
    size = max(256, n_bytes // 2)
    sets = _n_sets(n_bytes)
    pairs = [
        [torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)] for _ in range(sets)
    ]
    return microseconds([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])


def _n_sets(n_bytes: int) -> int:
    return max(2, min(64, CACHE_BYTES // max(n_bytes, 1) + 1))


def layer_calls(op: str, impl: str, shape: Shape, dtype: torch.dtype) -> tuple[list[Callable], int]:
    """Calls of one op on several sets of inputs, and the bytes that one must move."""
    rows, n = shape.n_records * shape.draws, shape.n_records

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=torch.float32).to(dtype)

    def inputs() -> dict[str, Tensor]:
        return {
            "x": normal(rows, shape.tokens, shape.in_features),
            "g": normal(rows, shape.tokens, shape.out_features),
            "y": normal(rows, shape.tokens, shape.out_features),
            "dx": normal(rows, shape.tokens, shape.in_features),
            "h": normal(rows, shape.tokens, shape.rank),
            "lora_a": normal(shape.rank, shape.in_features, dtype=torch.float32),
            "lora_b": normal(shape.out_features, shape.rank, dtype=torch.float32),
            "grad_a": normal(n, shape.rank, shape.in_features, dtype=torch.float32),
            "grad_b": normal(n, shape.out_features, shape.rank, dtype=torch.float32),
        }

    used = {
        "lora_forward": ("x", "y", "y", "h", "lora_a", "lora_b"),
        "lora_side_b": ("g", "h", "h", "lora_b", "grad_b"),
        "lora_side_a": ("x", "dx", "dx", "h", "lora_a", "grad_a"),
        "per_record_product": ("g", "x"),
        "product_sq_norms": ("g", "x"),
    }[op]
    one = inputs()
    n_bytes = sum(one[name].nbytes for name in used)
    if op == "per_record_product":
        n_bytes += 4 * n * shape.in_features * shape.out_features
    sets = [one] + [inputs() for _ in range(_n_sets(n_bytes) - 1)]
    return [lambda i=i: _call(op, impl, n, i) for i in sets], n_bytes


def _call(op: str, impl: str, n: int, i: dict[str, Tensor]) -> None:
    if impl == "opacus":
        _opacus(op, n, i)
        return
    kind = "triton" if impl == "triton" else "reference"
    if op == "lora_forward":
        ops.lora_forward(i["y"], i["x"], i["lora_a"], i["lora_b"], scaling=1.0, impl=kind)
    elif op == "lora_side_b":
        ops.lora_side_b(
            i["g"], i["h"], i["lora_b"], scaling=1.0, n_records=n, out=i["grad_b"], impl=kind
        )
    elif op == "lora_side_a":
        ops.lora_side_a(
            i["x"],
            i["h"],
            i["lora_a"],
            n_records=n,
            input_grad=i["dx"],
            out=i["grad_a"],
            impl=kind,
        )
    else:
        getattr(ops, op)(i["g"], i["x"], n_records=n, impl=kind)


def _opacus(op: str, n: int, i: dict[str, Tensor]) -> None:
    """What PEFT and Opacus' hooks do for the same layer, in its formulas."""
    dtype = i["x"].dtype
    a, b = i["lora_a"].to(dtype), i["lora_b"].to(dtype)
    if op == "lora_forward":
        i["y"] + 1.0 * ((i["x"] @ a.T) @ b.T)
    elif op == "lora_side_b":
        i["g"] @ b
        _einsum(i["g"], i["h"], n).flatten(1).norm(dim=1)
    elif op == "lora_side_a":
        i["dx"] + i["h"] @ a
        _einsum(i["h"], i["x"], n).flatten(1).norm(dim=1)
    else:
        _einsum(i["g"], i["x"], n).flatten(1).norm(dim=1)


def _einsum(backprops: Tensor, activations: Tensor, n: int) -> Tensor:
    g, x = (t.reshape(n, -1, t.shape[-1]) for t in (backprops, activations))
    return torch.einsum("n...i,n...j->nij", g, x)


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
    # ChaCha20 takes 976 instructions for a block of eight normals, Box-Muller about 130 for a pair.
    roofline = 1e6 * (N_VALUES / 8 * 976 + N_VALUES / 2 * 130) / _integer_rate()
    return {"us": taken, "randn_us": randn, "roofline_us": roofline, "share": roofline / taken}


def _integer_rate() -> float:
    """Integer, and as many float64, instructions a second: 64 a clock and multiprocessor."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000)  # kHz; an H200's, where torch tells none
    return 64 * properties.multi_processor_count * 1e3 * clock


def measure_step(batch: int) -> dict[str, float]:
    """All per-record work of one SD 1.5 step, and the UNet's own forward and backward."""
    parts = {"lora_forward": 0.0, "lora_side_b": 0.0, "lora_side_a": 0.0}
    for shape, count in MODELS["sd15_512"].items():
        shape = replace(shape, n_records=batch)
        for op in parts:
            calls, _ = layer_calls(op, "triton", shape, torch.bfloat16)
            parts[op] += count * microseconds(calls, 0.05)
    parts["clip_and_sum"] = measure_slab("clip_and_sum", "triton", batch)["us"]
    parts["add_noise"] = measure_noise()["us"]
    per_record = sum(parts.values()) - parts["lora_forward"]
    unet = _unet_microseconds(batch)
    return {**parts, "per_record_us": per_record, "unet_us": unet, "share": per_record / unet}


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
