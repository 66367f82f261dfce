"""Side B of a LoRA layer's backward pass: one read of the backprops g.

    u[n,t] = s g[n,t] B             [R]      goes to side A
    grad_b[n] = s Σ_t g[n,t]ᵀ h[n,t]         [O, R], t over all K·T rows of record n

One program owns BLOCK_T rows of one record and loops over the features of g: each tile of g adds to
u, which stays in registers, and gives the rows' share of one tile of grad_b. Where one program
holds all rows of the record, it rounds that tile to the type of the slab and stores it; otherwise
`split_sum` adds the shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split_sum, tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, load_rows, narrow, record_strides, row_offsets, row_strides


@triton.jit
def _lora_side_b_kernel(
    g_ptr,
    g_stride_row,
    g_stride_t,
    g_stride_f,
    h_ptr,
    h_stride_row,
    h_stride_t,
    h_stride_f,
    b_ptr,
    b_stride_o,
    b_stride_r,
    u_ptr,
    u_stride_row,
    u_stride_t,
    u_stride_f,
    grad_ptr,
    grad_stride_n,
    grad_stride_split,
    scaling,
    K,
    T,
    O,  # noqa: E741
    R,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    split, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q = split * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    h = load_rows(h_ptr, h_stride_row, h_stride_t, h_stride_f, n, q, r, K, T, R, FLAT).to(COMPUTE)
    grad_ptr += n * grad_stride_n + split.to(tl.int64) * grad_stride_split

    u = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(0, O, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        in_tile = (o[:, None] < O) & (r[None, :] < R)
        g = load_rows(g_ptr, g_stride_row, g_stride_t, g_stride_f, n, q, o, K, T, O, FLAT)
        b = tl.load(
            b_ptr + o[:, None] * b_stride_o + r[None, :] * b_stride_r, mask=in_tile, other=0.0
        )
        # As in the eager matrix product, B takes the type of the backprops.
        b_rounded = narrow(b, g.dtype).to(COMPUTE)
        # TF32 rounds norms down as easily as up, and a low norm breaks the clip bound.
        u = tl.dot(g.to(COMPUTE), b_rounded, u, input_precision="ieee")
        grad = scaling * tl.dot(tl.trans(g.to(COMPUTE)), h, input_precision="ieee")
        stored = narrow(grad, grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + o[:, None].to(tl.int64) * R + r[None, :], stored, mask=in_tile)

    rows = row_offsets(u_stride_row, u_stride_t, n, q, K, T, FLAT)
    u_ptrs = u_ptr + rows[:, None] + r[None, :].to(tl.int64) * u_stride_f
    u_rounded = narrow(scaling * u, u_ptr.dtype.element_ty)
    tl.store(u_ptrs, u_rounded, mask=(q[:, None] < K * T) & (r[None, :] < R))


def launches(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    u: Tensor,
    grad_b: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launches of side B.

    backprops [N·K, T, O], h [N·K, T, R], lora_b [O, R] -> u [N·K, T, R], grad_b [N, O, R].
    """
    n_records, features, rank = grad_b.shape
    draws, tokens = len(backprops) // max(n_records, 1), backprops.shape[1]
    tile = tile or tiling.lora_side_b(rank, backprops.element_size())
    splits = tile.splits(draws * tokens)
    partial = grad_b.unsqueeze(1)
    if splits > 1:
        partial = grad_b.new_empty((n_records, splits, *grad_b.shape[1:]), dtype=torch.float32)
    side_b = Launch(
        kernel=_lora_side_b_kernel,
        grid=(splits, n_records),
        arguments={
            "g_ptr": backprops,
            **row_strides("g", backprops),
            "h_ptr": h,
            **row_strides("h", h),
            "b_ptr": lora_b,
            "b_stride_o": lora_b.stride(0),
            "b_stride_r": lora_b.stride(1),
            "u_ptr": u,
            **row_strides("u", u),
            "grad_ptr": partial,
            "grad_stride_n": record_strides(grad_b) if splits == 1 else partial.stride(0),
            "grad_stride_split": partial.stride(1),
            "scaling": scaling,
            "K": draws,
            "T": tokens,
            "O": features,
            "R": rank,
        },
        constants={
            "BLOCK_T": tile.block_t,
            "BLOCK_O": tile.block_d,
            "BLOCK_R": tile.block_l,
            "FLAT": is_flat(draws, backprops, h, u),
            "COMPUTE": compute_dtype(backprops.dtype),
        },
        bytes_moved=nbytes(backprops, h, lora_b, u, partial),
        flops=4 * backprops.numel() * rank,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits == 1:
        return [side_b]
    return [side_b, split_sum.launch(partial, grad_b)]
