"""Per-record gradient of an embedding's weight, without atomics.

    grad[n, v] = Σ_{t: ids[n,t] = v} g[n,t]      [V, D], t over all K·T rows of record n

and 0 for ``padding_idx``. A first kernel fills the gradient with zeros, so it may hold anything
before. In the second, one program owns BLOCK_D features at one row t of one record. If an earlier
row has the same id the program has nothing to do; otherwise it adds the backprops of all rows with
this id, in float32 over every BLOCK_T-th row and at the end once in float64, rounds to the type of
the slab and stores. So each element is written by one program, which sums in an order that the
record's own rows decide.

Every program reads all ids of its record, (K·T)² reads in all, but only those rows of g that it
sums: K·T is a few hundred where embeddings are trained (captions, classes).
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes
from .tiles import is_flat, narrow, record_strides, row_offsets, row_strides


@triton.jit
def _zero_kernel(grad_ptr, grad_stride_n, E, BLOCK: tl.constexpr):
    block, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dtype=grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + n * grad_stride_n + e, zeros, mask=e < E)


@triton.jit
def _embedding_kernel(
    ids_ptr,
    ids_stride_row,
    ids_stride_t,
    g_ptr,
    g_stride_row,
    g_stride_t,
    g_stride_f,
    grad_ptr,
    grad_stride_n,
    padding_idx,
    K,
    T,
    V,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
):
    tile, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = tile // tiles_d
    d = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.load(ids_ptr + row_offsets(ids_stride_row, ids_stride_t, n, t, K, T, FLAT))

    earlier = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for first in range(0, t, BLOCK_T):
        q = first + tl.arange(0, BLOCK_T)
        offsets = row_offsets(ids_stride_row, ids_stride_t, n, q, K, T, FLAT)
        ids = tl.load(ids_ptr + offsets, mask=q < t, other=-1)
        earlier |= (ids == v).to(tl.int32)
    # The forward pass refuses ids out of range; should one come, it must not reach another record.
    owns = (tl.max(earlier) == 0) & (v >= 0) & (v < V) & (v != padding_idx)

    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for first in range(t, tl.where(owns, K * T, t), BLOCK_T):
        q = first + tl.arange(0, BLOCK_T)
        offsets = row_offsets(ids_stride_row, ids_stride_t, n, q, K, T, FLAT)
        ids = tl.load(ids_ptr + offsets, mask=q < K * T, other=-1)
        rows = row_offsets(g_stride_row, g_stride_t, n, q, K, T, FLAT)
        g_ptrs = g_ptr + rows[:, None] + d[None, :].to(tl.int64) * g_stride_f
        mask = (q[:, None] < K * T) & (ids[:, None] == v) & (d[None, :] < D)
        total += tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)

    mask = (d < D) & owns
    grad = tl.sum(total.to(tl.float64), 0).to(tl.float32)
    stored = narrow(grad, grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + n * grad_stride_n + v.to(tl.int64) * D + d, stored, mask=mask)


def tile_of(features: int) -> tiling.Tiling:
    """One program owns up to 128 features at one row and looks at 32 rows at a time."""
    return tiling.Tiling(32, 32, 1, min(128, tiling.pad(features)), 4, 2)


def launches(
    ids: Tensor,
    backprops: Tensor,
    padding_idx: int | None,
    grad: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launches of an embedding.

    ids int [N·K, T], backprops [N·K, T, D] -> grad [N, V, D].
    """
    n_records, num_embeddings, features = grad.shape
    draws, tokens = len(ids) // max(n_records, 1), ids.shape[1]
    tile = tile or tile_of(features)
    tiles = draws * tokens * tiling.ceil_div(features, tile.block_d)
    n_elements = num_embeddings * features
    zero = Launch(
        kernel=_zero_kernel,
        grid=(tiling.ceil_div(n_elements, tiling.ELEMENTS), n_records),
        arguments={
            "grad_ptr": grad,
            "grad_stride_n": record_strides(grad),
            "E": n_elements,
        },
        constants={"BLOCK": tiling.ELEMENTS},
        bytes_moved=nbytes(grad),
        flops=0,
    )
    scatter = Launch(
        kernel=_embedding_kernel,
        grid=(tiles, n_records),
        arguments={
            "ids_ptr": ids,
            "ids_stride_row": ids.stride(0),
            "ids_stride_t": ids.stride(1),
            "g_ptr": backprops,
            **row_strides("g", backprops),
            "grad_ptr": grad,
            "grad_stride_n": record_strides(grad),
            "padding_idx": -1 if padding_idx is None else padding_idx % num_embeddings,
            "K": draws,
            "T": tokens,
            "V": num_embeddings,
            "D": features,
        },
        constants={
            "BLOCK_T": tile.block_t,
            "BLOCK_D": tile.block_d,
            "FLAT": is_flat(draws, ids, backprops),
        },
        bytes_moved=nbytes(ids, backprops) + backprops.numel() * grad.element_size(),
        flops=backprops.numel(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return [zero, scatter]
