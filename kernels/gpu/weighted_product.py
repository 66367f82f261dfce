"""The clipped sum of full weights as one product, without a slab.

    sum = Σ_n weights[n] Σ_t left[n,t]ᵀ right[n,t]        [L, D], float64

One program owns a [BLOCK_L, BLOCK_D] tile of the sum and a few records. For each record it forms
the tile of the product exactly as `product_sq_norms` did, multiplies the finished tile by the
record's weight in float64 and adds it. Weighting the rows instead would round each of them, and
leave a residue that no norm bounds where draws cancel. Records of weight 0 that are not kept are
selected away. The programs' sums are added in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, product_tile, row_strides


@triton.jit
def _weighted_product_kernel(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    weights_ptr,
    keep_ptr,
    sums_ptr,
    N,
    K,
    T,
    L,
    D,
    RECORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_d = tl.cdiv(D, BLOCK_D)
    l = (tile // tiles_d) * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    d = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float64)
    for n in range(group * RECORDS, tl.minimum((group + 1) * RECORDS, N)):
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
        weight = tl.load(weights_ptr + n)
        kept = tl.load(keep_ptr + n) != 0
        total += tl.where(kept, weight * product.to(tl.float64), 0.0)
    sum_ptrs = sums_ptr + group * L * D + l[None, :].to(tl.int64) * D + d[:, None]
    tl.store(sum_ptrs, total, mask=(d[:, None] < D) & (l[None, :] < L))


def launches(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    keep: Tensor,
    sums: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """left [N·K, T, L], right [N·K, T, D], weights float64 [N], keep bool [N] -> sums.

    sums float64 [G, L, D], one for each group of ``tiling.RECORDS`` records; their sum is the
    result.
    """
    n_records = len(weights)
    left_features, features = left.shape[-1], right.shape[-1]
    draws = len(right) // max(n_records, 1)
    tile = tile or tiling.whole_product(left_features)
    return [
        Launch(
            kernel=_weighted_product_kernel,
            grid=(tile.tiles(left_features, features), len(sums)),
            arguments={
                "left_ptr": left,
                **row_strides("left", left),
                "right_ptr": right,
                **row_strides("right", right),
                "weights_ptr": weights,
                "keep_ptr": keep,
                "sums_ptr": sums,
                "N": n_records,
                "K": draws,
                "T": right.shape[1],
                "L": left_features,
                "D": features,
            },
            constants={
                "RECORDS": tiling.RECORDS,
                "BLOCK_T": tile.block_t,
                "BLOCK_L": tile.block_l,
                "BLOCK_D": tile.block_d,
                "FLAT": is_flat(draws, left, right),
                "COMPUTE": compute_dtype(right.dtype),
            },
            bytes_moved=nbytes(left, right, weights, keep, sums),
            flops=2 * right.numel() * left_features + 2 * n_records * left_features * features,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
