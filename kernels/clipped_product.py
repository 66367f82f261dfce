"""Per-layer clipping in one kernel: norm, clip and accumulate, no gradient leaves the chip.

    sum = Σ_n c[n] s grad[n],   grad[n] = Σ_t left[n,t]ᵀ right[n,t],   s = loss_scale
    c[n] = min(1, C / ‖s grad[n]‖), rounded down

One program owns a few records and the whole weight. For each record it forms the gradient in
registers, squares it, finds the clip factor, and adds the clipped gradient to the program's own sum
in memory, a sum over records. That needs the whole gradient in registers at once: a LoRA factor of
up to `tiling.ON_CHIP` elements. Larger ones take `product_sq_norms` and `weighted_product`.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import clip_factor, is_finite, is_flat, product_tile, row_strides, sum_of_squares


@triton.jit
def _clipped_product_kernel(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    keep_ptr,
    sums_ptr,
    max_grad_norm: tl.float64,
    loss_scale: tl.float64,
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
    group = tl.program_id(0).to(tl.int64)
    l, d = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)  # noqa: E741
    sum_ptrs = sums_ptr + group * L * D + l[None, :] * D + d[:, None]
    in_tile = (d[:, None] < D) & (l[None, :] < L)
    tl.store(sum_ptrs, tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float64), mask=in_tile)
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
        sq_norm = sum_of_squares(product) * (loss_scale * loss_scale)
        weight = loss_scale * clip_factor(sq_norm, max_grad_norm)
        kept = (tl.load(keep_ptr + n) != 0) & is_finite(sq_norm)
        clipped = tl.where(kept, weight * product.to(tl.float64), 0.0)
        tl.store(sum_ptrs, tl.load(sum_ptrs, mask=in_tile, other=0.0) + clipped, mask=in_tile)


def launches(
    left: Tensor,
    right: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    sums: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """left [N·K, T, L], right [N·K, T, D], keep bool [N] -> sums float64 [G, L, D].

    One sum for each group of ``tiling.RECORDS`` records; their sum is the result.
    """
    n_records = len(keep)
    left_features, features = left.shape[-1], right.shape[-1]
    draws = len(right) // max(n_records, 1)
    tile = tile or tiling.on_chip(left_features, features)
    return [
        Launch(
            kernel=_clipped_product_kernel,
            grid=(len(sums),),
            arguments={
                "left_ptr": left,
                **row_strides("left", left),
                "right_ptr": right,
                **row_strides("right", right),
                "keep_ptr": keep,
                "sums_ptr": sums,
                "max_grad_norm": max_grad_norm,
                "loss_scale": loss_scale,
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
            bytes_moved=nbytes(left, right, keep, sums),
            flops=2 * right.numel() * left_features + 4 * n_records * left_features * features,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
