"""Other block sizes of the kernels that read activations and backprops, timed on a GPU."""

from typing import Any

import torch
from torch import Tensor

from dpengine.kernels import lora_forward, lora_side_b, product, tiling
from dpengine.kernels.launch import Launch, run

from . import timing
from .shapes import Shape


def tune(op: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Times of other block sizes, the best first; the default leads ``all``."""
    default = _default_tile(op, shape, dtype)
    results = []
    for tile in _candidates(default):
        try:
            launches = [_tuned(op, shape, dtype, tile) for _ in range(4)]
            results.append(
                (timing.microseconds([lambda x=x: run(x) for x in launches], 0.05), tile)
            )
        except Exception as error:  # too much shared memory, say
            results.append((float("inf"), f"{tile}: {type(error).__name__}"))
    best = min(results, key=lambda result: result[0])
    return {
        "default_us": results[0][0],
        "best_us": best[0],
        "best": best[1],
        "all": [(us, str(tile)) for us, tile in sorted(results, key=lambda r: r[0])[:8]],
    }


def _default_tile(op: str, shape: Shape, dtype: torch.dtype) -> tiling.Tiling:
    choose = tiling.product if op == "lora_side_a" else getattr(tiling, op)
    return choose(shape.rank, dtype.itemsize)


def _candidates(default: tiling.Tiling) -> list[tiling.Tiling]:
    found = [default]
    for block_t in {max(16, default.block_t // 2), default.block_t, default.block_t * 2}:
        # A tile that sums more rows than it holds keeps them; the others hold what they sum.
        rows = [256, 512, 1024, 2048] if default.rows > default.block_t else [block_t]
        for n_rows in rows:
            for block_d in {32, 64, 128}:
                for num_warps in (4, 8):
                    for num_stages in (2, 3, 4):
                        tile = tiling.Tiling(
                            block_t, n_rows, default.block_l, block_d, num_warps, num_stages
                        )
                        found.append(tile)
    return list(dict.fromkeys(found))


def _tuned(op: str, shape: Shape, dtype: torch.dtype, tile: tiling.Tiling) -> list[Launch]:
    rows, n = shape.n_records * shape.draws, shape.n_records

    def tokens(features: int) -> Tensor:
        return torch.randn(rows, shape.tokens, features, device=timing.DEVICE).to(dtype)

    x, g = tokens(shape.in_features), tokens(shape.out_features)
    h, u = tokens(shape.rank), tokens(shape.rank)
    lora_a = torch.randn(shape.rank, shape.in_features, device=timing.DEVICE)
    lora_b = torch.randn(shape.out_features, shape.rank, device=timing.DEVICE)
    norms = torch.empty(n, 4096, dtype=torch.float64, device=timing.DEVICE)
    if op == "lora_forward":
        return lora_forward.launches(g, x, lora_a, lora_b, 1.0, h, tile)
    if op == "lora_side_b":
        grad = torch.empty(n, *lora_b.shape, device=timing.DEVICE)
        return lora_side_b.launches(g, h, lora_b, 1.0, u, grad, norms, tile)
    grad = torch.empty(n, *lora_a.shape, device=timing.DEVICE)
    return product.launches(u, x, grad, norms, lora_a, torch.zeros_like(x), tile)
