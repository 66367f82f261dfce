"""Gram ("ghost") norms for few rows: squared norms of products without forming them.

    ‖Σ_t l_tᵀ r_t‖² = Σ_{t,t'} (l_t · l_t') (r_t · r_t')

t and t' run over all K·T rows of a record, so the cross terms between its draws are kept. One
program owns a [BLOCK_T, BLOCK_T] tile of pairs (t, t') of one record: two Gram tiles over the
features, multiplied and summed in float64. Programs on the diagonal also give the sums over rows of
``‖l_t‖ ‖r_t‖``, ``‖l_t‖`` and ``‖r_t‖``, squared and added in float64, from which
`reference.gram_upper_bound` makes a bound that clipping can trust.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, load_rows, row_strides


@triton.jit
def _gram_kernel(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    gram_ptr,
    row_norms_ptr,
    K,
    T,
    L,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    i, j, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    p, q = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
    left = _gram_tile(
        left_ptr,
        left_stride_row,
        left_stride_t,
        left_stride_f,
        n,
        p,
        q,
        K,
        T,
        L,
        BLOCK_T,
        BLOCK_F,
        FLAT,
        COMPUTE,
    )
    right = _gram_tile(
        right_ptr,
        right_stride_row,
        right_stride_t,
        right_stride_f,
        n,
        p,
        q,
        K,
        T,
        D,
        BLOCK_T,
        BLOCK_F,
        FLAT,
        COMPUTE,
    )
    products = left.to(tl.float64) * right.to(tl.float64)
    tl.store(gram_ptr + (n * blocks + i) * blocks + j, tl.sum(tl.ravel(products)))
    if i == j:
        left_norms = _row_norms(
            left_ptr,
            left_stride_row,
            left_stride_t,
            left_stride_f,
            n,
            p,
            K,
            T,
            L,
            BLOCK_T,
            BLOCK_F,
            FLAT,
        )
        right_norms = _row_norms(
            right_ptr,
            right_stride_row,
            right_stride_t,
            right_stride_f,
            n,
            p,
            K,
            T,
            D,
            BLOCK_T,
            BLOCK_F,
            FLAT,
        )
        sum_ptrs = row_norms_ptr + (n * blocks + i) * 3
        tl.store(sum_ptrs, tl.sum(left_norms * right_norms))
        tl.store(sum_ptrs + 1, tl.sum(left_norms))
        tl.store(sum_ptrs + 2, tl.sum(right_norms))


@triton.jit
def _row_norms(
    ptr,
    stride_row,
    stride_t,
    stride_f,
    n,
    p,
    K,
    T,
    F,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Norms of rows ``p`` of record n, from float64 squares.  float64 [len(p)]"""
    squares = tl.zeros((BLOCK_T,), dtype=tl.float64)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        rows = load_rows(ptr, stride_row, stride_t, stride_f, n, p, f, K, T, F, FLAT)
        wide = rows.to(tl.float64)
        squares += tl.sum(wide * wide, axis=1)
    return tl.sqrt(squares)


@triton.jit
def _gram_tile(
    ptr,
    stride_row,
    stride_t,
    stride_f,
    n,
    p,
    q,
    K,
    T,
    F,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scalar products of rows ``p`` and ``q`` of record n.  float32 [len(p), len(q)]"""
    gram = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        a = load_rows(ptr, stride_row, stride_t, stride_f, n, p, f, K, T, F, FLAT)
        b = load_rows(ptr, stride_row, stride_t, stride_f, n, q, f, K, T, F, FLAT)
        gram = tl.dot(a.to(COMPUTE), tl.trans(b.to(COMPUTE)), gram, input_precision="ieee")
    return gram


def n_blocks(n_rows: int) -> int:
    """Blocks of rows of one record."""
    return tiling.ceil_div(n_rows, tiling.gram().block_t)


def launches(left: Tensor, right: Tensor, gram: Tensor, row_norms: Tensor) -> list[Launch]:
    """left [N·K, T, L], right [N·K, T, D] -> gram float64 [N, S, S], row_norms [N, S, 3]."""
    n_records, blocks = row_norms.shape[:2]
    draws, tile = len(left) // max(n_records, 1), tiling.gram()
    n_rows = draws * left.shape[1]
    features = left.shape[-1] + right.shape[-1]
    return [
        Launch(
            kernel=_gram_kernel,
            grid=(blocks, blocks, n_records),
            arguments={
                "left_ptr": left,
                **row_strides("left", left),
                "right_ptr": right,
                **row_strides("right", right),
                "gram_ptr": gram,
                "row_norms_ptr": row_norms,
                "K": draws,
                "T": left.shape[1],
                "L": left.shape[-1],
                "D": right.shape[-1],
            },
            constants={
                "BLOCK_T": tile.block_t,
                "BLOCK_F": tile.block_d,
                "FLAT": is_flat(draws, left, right),
                "COMPUTE": compute_dtype(left.dtype),
            },
            bytes_moved=nbytes(left, right, gram, row_norms),
            flops=2 * n_records * n_rows**2 * (features + 1),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
