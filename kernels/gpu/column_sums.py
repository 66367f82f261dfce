"""Per-record sums over rows: the gradients of biases and of the weights of norm layers.

    grad[n] = Σ_t g[n,t]                 [C], t over all K·T rows of record n
    grad[n] = Σ_t g[n,t] x̂[n,t]          with a second factor, element by element

One program owns BLOCK_C columns of one record's gradient and a fixed number of the record's rows.
It keeps BLOCK_T sums of each column in float32, of every BLOCK_T-th row, and adds them at the end,
once and therefore in float64. Where one program holds all rows, it rounds the sums to the type of
the slab and stores them; otherwise `split_sum` adds the programs' shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split_sum, tiling
from .launch import Launch, nbytes
from .tiles import is_flat, load_rows, narrow, record_strides, row_strides


@triton.jit
def _column_sums_kernel(
    g_ptr,
    g_stride_row,
    g_stride_t,
    g_stride_f,
    x_ptr,
    x_stride_row,
    x_stride_t,
    x_stride_f,
    grad_ptr,
    grad_stride_n,
    grad_stride_split,
    K,
    T,
    C,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FACTOR: tl.constexpr,
    FLAT: tl.constexpr,
):
    tile, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for first in range(split * ROWS, tl.minimum((split + 1) * ROWS, K * T), BLOCK_T):
        q = first + tl.arange(0, BLOCK_T)
        terms = load_rows(g_ptr, g_stride_row, g_stride_t, g_stride_f, n, q, c, K, T, C, FLAT)
        terms = terms.to(tl.float32)
        if FACTOR:
            x = load_rows(x_ptr, x_stride_row, x_stride_t, x_stride_f, n, q, c, K, T, C, FLAT)
            terms *= x.to(tl.float32)
        total += terms

    grad_ptr += n * grad_stride_n + split.to(tl.int64) * grad_stride_split
    grad = tl.sum(total.to(tl.float64), 0).to(tl.float32)
    stored = narrow(grad, grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + c, stored, mask=c < C)


def tile_of() -> tiling.Tiling:
    """One program owns 64 columns and sums 512 rows.

    Either axis may be the one that lies together in memory: tiles are about square. A partial sum
    is 4 bytes for 512 elements read, so that there may be many.
    """
    return tiling.Tiling(32, 512, 1, 64, 4, 2)


def launches(
    backprops: Tensor,
    factor: Tensor | None,
    grad: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launches of a sum over rows, of products with ``factor`` if it is given.

    backprops and factor [N·K, T, C] -> grad [N, C].
    """
    n_records, channels = grad.shape
    draws, tokens = len(backprops) // max(n_records, 1), backprops.shape[1]
    tile = tile or tile_of()
    splits = tile.splits(draws * tokens)
    partial = grad.unsqueeze(1)
    if splits > 1:
        partial = grad.new_empty((n_records, splits, channels), dtype=torch.float32)
    sums = Launch(
        kernel=_column_sums_kernel,
        grid=(tiling.ceil_div(channels, tile.block_d), splits, n_records),
        arguments={
            "g_ptr": backprops,
            **row_strides("g", backprops),
            "x_ptr": factor,
            **row_strides("x", backprops if factor is None else factor),
            "grad_ptr": partial,
            "grad_stride_n": record_strides(grad) if splits == 1 else partial.stride(0),
            "grad_stride_split": partial.stride(1),
            "K": draws,
            "T": tokens,
            "C": channels,
        },
        constants={
            "ROWS": tile.rows,
            "BLOCK_T": tile.block_t,
            "BLOCK_C": tile.block_d,
            "FACTOR": factor is not None,
            "FLAT": is_flat(draws, backprops, factor),
        },
        bytes_moved=nbytes(backprops, factor, partial),
        flops=backprops.numel() * (1 if factor is None else 2),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits == 1:
        return [sums]
    return [sums, split_sum.launch(partial, grad)]
