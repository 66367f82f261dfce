"""Other block sizes of the kernels that read activations and backprops, timed on a GPU."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpengine.kernels.gpu import lora_forward, lora_side_b, product, tiling
from dpengine.kernels.gpu.launch import Launch, run

from ..shapes import Shape
from . import timing


def tune(op: str, shape: Shape, dtype: torch.dtype, deadline: float) -> dict[str, Any]:
    """Times of other block sizes, the best first, as far as the time reaches."""
    inputs = [_inputs(shape, dtype) for _ in range(3)]
    results = []
    for tile in _candidates(_default_tile(op, shape, dtype)):
        if results and time.monotonic() > deadline:
            break
        try:
            tried = [_launches(op, tensors, tile) for tensors in inputs]
            results.append((timing.microseconds([partial(run, t) for t in tried], 0.01), str(tile)))
        except Exception as error:  # too much shared memory, say
            results.append((None, f"{tile}: {type(error).__name__}"))
    times = sorted((us, tile) for us, tile in results if us is not None)
    return {
        "default_us": results[0][0],
        "best_us": times[0][0],
        "best": times[0][1],
        "all": times[:8],
    }


def _default_tile(op: str, shape: Shape, dtype: torch.dtype) -> tiling.Tiling:
    choose = tiling.product if op == "lora_side_a" else getattr(tiling, op)
    return choose(shape.rank, dtype.itemsize)


def _candidates(default: tiling.Tiling) -> list[tiling.Tiling]:
    """The default, then one change at a time, then changes of both threads and stages."""
    block_t = default.block_t
    found = [default]
    for size in (block_t // 2, block_t * 2):
        # A program that sums more rows than it holds keeps their number; others sum what they hold.
        rows = default.rows if default.rows > block_t else size
        found.append(replace(default, block_t=size, rows=rows))
    if default.rows > block_t:
        found += [replace(default, rows=rows) for rows in (256, 1024, 2048)]
    found += [replace(default, block_d=block_d) for block_d in (32, 128)]
    for num_warps in (4, 8):
        for num_stages in (1, 2, 3, 4):
            found.append(replace(default, num_warps=num_warps, num_stages=num_stages))
    return list(dict.fromkeys(found))


def _inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    device, rows, n = timing.DEVICE, shape.n_records * shape.draws, shape.n_records

    def tokens(features: int) -> Tensor:
        return torch.randn(rows, shape.tokens, features, device=device).to(dtype)

    return {
        "x": tokens(shape.in_features),
        "g": tokens(shape.out_features),
        "dx": tokens(shape.in_features),
        "h": tokens(shape.rank),
        "u": tokens(shape.rank),
        "lora_a": torch.randn(shape.rank, shape.in_features, device=device),
        "lora_b": torch.randn(shape.out_features, shape.rank, device=device),
        "grad_a": torch.empty(n, shape.rank, shape.in_features, device=device),
        "grad_b": torch.empty(n, shape.out_features, shape.rank, device=device),
    }


def _launches(op: str, i: dict[str, Tensor], tile: tiling.Tiling) -> list[Launch]:
    if op == "lora_forward":
        return lora_forward.launches(i["g"], i["x"], i["lora_a"], i["lora_b"], 1.0, i["h"], tile)
    if op == "lora_side_b":
        return lora_side_b.launches(i["g"], i["h"], i["lora_b"], 1.0, i["u"], i["grad_b"], tile)
    out = (i["grad_a"], i["lora_a"], i["dx"])
    return product.launches(i["u"], i["x"], *out, tile)
