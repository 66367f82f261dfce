"""Squared norms of per-record products without a slab: no gradient reaches memory.

    sq_norms[n] = ‖Σ_t left[n,t]ᵀ right[n,t]‖²

One program owns a [BLOCK_L, BLOCK_D] tile of one record's product, sums all of the record's rows in
registers, and writes one partial squared norm. `weighted_product` forms the same tiles in the same
order, so what it clips has, bit for bit, the norm found here.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, product_tile, row_strides, sum_of_squares


@triton.jit
def _product_sq_norms_kernel(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    sq_norms_ptr,
    K,
    T,
    L,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_d = tl.cdiv(D, BLOCK_D)
    l = (tile // tiles_d) * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    d = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    product = product_tile(
        left_ptr,
        left_stride_row,
        left_stride_t,
        left_stride_f,
        right_ptr,
        right_stride_row,
        right_stride_t,
        right_stride_f,
        n,
        l,
        d,
        K,
        T,
        L,
        D,
        BLOCK_T,
        BLOCK_L,
        BLOCK_D,
        FLAT,
        COMPUTE,
    )
    tl.store(sq_norms_ptr + n * tl.num_programs(0) + tile, sum_of_squares(product))


def sq_norm_columns(left_features: int, right_features: int) -> int:
    """Partial squared norms of each record that ``launches`` writes."""
    tile = tiling.whole_product(left_features)
    return tile.tiles(left_features, right_features)


def launches(
    left: Tensor, right: Tensor, sq_norms: Tensor, tile: tiling.Tiling | None = None
) -> list[Launch]:
    """left [N·K, T, L], right [N·K, T, D] -> sq_norms float64 [N, M]."""
    n_records = len(sq_norms)
    left_features, features = left.shape[-1], right.shape[-1]
    draws = len(right) // max(n_records, 1)
    tile = tile or tiling.whole_product(left_features)
    return [
        Launch(
            kernel=_product_sq_norms_kernel,
            grid=(tile.tiles(left_features, features), n_records),
            arguments={
                "left_ptr": left,
                **row_strides("left", left),
                "right_ptr": right,
                **row_strides("right", right),
                "sq_norms_ptr": sq_norms,
                "K": draws,
                "T": right.shape[1],
                "L": left_features,
                "D": features,
            },
            constants={
                "BLOCK_T": tile.block_t,
                "BLOCK_L": tile.block_l,
                "BLOCK_D": tile.block_d,
                "FLAT": is_flat(draws, left, right),
                "COMPUTE": compute_dtype(right.dtype),
            },
            bytes_moved=nbytes(left, right, sq_norms),
            flops=2 * right.numel() * left_features + 2 * n_records * left_features * features,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
