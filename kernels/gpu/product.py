"""Per-record products over rows, with the input gradient of a LoRA layer in the same pass.

    grad[n] = Σ_t left[n,t]ᵀ right[n,t]          [L, D], t over all K·T rows of record n
    input_grad[n,t] += left[n,t] A               A: [L, D], optional

Side A of LoRA is this with left = u, right = x, A = lora_a; the gradient of a full weight is this
with left = backprops, right = activations.

One program owns a [BLOCK_L, BLOCK_D] tile of one record's gradient and a fixed number of the
record's rows. Where one program holds all rows, it rounds the tile to the type of the slab and
stores it; otherwise it stores a partial sum that `split_sum` finishes. Right is read once, left
once for each tile of D, which for a LoRA factor is little.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split_sum, tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, load_rows, narrow, record_strides, row_offsets, row_strides


@triton.jit
def _product_kernel(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    a_ptr,
    a_stride_l,
    a_stride_d,
    input_grad_ptr,
    input_grad_stride_row,
    input_grad_stride_t,
    input_grad_stride_f,
    grad_ptr,
    grad_stride_n,
    grad_stride_split,
    K,
    T,
    L,
    D,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_d = tl.cdiv(D, BLOCK_D)
    l = (tile // tiles_d) * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    d = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_tile = (d[:, None] < D) & (l[None, :] < L)
    if INPUT_GRAD:
        a = tl.load(
            a_ptr + l[:, None] * a_stride_l + d[None, :] * a_stride_d,
            mask=(l[:, None] < L) & (d[None, :] < D),
            other=0.0,
        )

    grad = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float32)
    for first in range(split * ROWS, tl.minimum((split + 1) * ROWS, K * T), BLOCK_T):
        q = first + tl.arange(0, BLOCK_T)
        left = load_rows(
            left_ptr, left_stride_row, left_stride_t, left_stride_f, n, q, l, K, T, L, FLAT
        )
        right = load_rows(
            right_ptr, right_stride_row, right_stride_t, right_stride_f, n, q, d, K, T, D, FLAT
        )
        # TF32 rounds norms down as easily as up, and a low norm breaks the clip bound.
        grad = tl.dot(tl.trans(right.to(COMPUTE)), left.to(COMPUTE), grad, input_precision="ieee")
        if INPUT_GRAD:
            rows = row_offsets(input_grad_stride_row, input_grad_stride_t, n, q, K, T, FLAT)
            dx_ptrs = input_grad_ptr + rows[:, None] + d[None, :].to(tl.int64) * input_grad_stride_f
            mask = (q[:, None] < K * T) & (d[None, :] < D)
            dx = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
            # As in the eager matrix product, A takes the type of the activations.
            a_rounded = narrow(a, right.dtype).to(COMPUTE)
            dx = tl.dot(left.to(COMPUTE), a_rounded, dx, input_precision="ieee")
            tl.store(dx_ptrs, narrow(dx, input_grad_ptr.dtype.element_ty), mask=mask)

    offsets = l[None, :].to(tl.int64) * D + d[:, None]
    grad_ptrs = grad_ptr + n * grad_stride_n + split.to(tl.int64) * grad_stride_split + offsets
    stored = narrow(grad, grad_ptr.dtype.element_ty)
    tl.store(grad_ptrs, stored, mask=in_tile)


def launches(
    left: Tensor,
    right: Tensor,
    grad: Tensor,
    lora_a: Tensor | None = None,
    input_grad: Tensor | None = None,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launches of one product.

    left [N·K, T, L], right and input_grad [N·K, T, D], lora_a [L, D] -> grad [N, L, D].
    """
    n_records, left_features, features = grad.shape
    draws, tokens = len(right) // max(n_records, 1), right.shape[1]
    tile = tile or tiling.product(left_features, right.element_size())
    splits = tile.splits(draws * tokens)
    partial = grad.unsqueeze(1)
    if splits > 1:
        partial = grad.new_empty((n_records, splits, *grad.shape[1:]), dtype=torch.float32)
    l_stride, d_stride = (0, 0) if lora_a is None else lora_a.stride()
    product = Launch(
        kernel=_product_kernel,
        grid=(tile.tiles(left_features, features), splits, n_records),
        arguments={
            "left_ptr": left,
            **row_strides("left", left),
            "right_ptr": right,
            **row_strides("right", right),
            "a_ptr": lora_a,
            "a_stride_l": l_stride,
            "a_stride_d": d_stride,
            "input_grad_ptr": input_grad,
            **row_strides("input_grad", right if input_grad is None else input_grad),
            "grad_ptr": partial,
            "grad_stride_n": record_strides(grad) if splits == 1 else partial.stride(0),
            "grad_stride_split": partial.stride(1),
            "K": draws,
            "T": tokens,
            "L": left_features,
            "D": features,
        },
        constants={
            "ROWS": tile.rows,
            "BLOCK_T": tile.block_t,
            "BLOCK_L": tile.block_l,
            "BLOCK_D": tile.block_d,
            "INPUT_GRAD": input_grad is not None,
            "FLAT": is_flat(draws, left, right, input_grad),
            "COMPUTE": compute_dtype(right.dtype),
        },
        bytes_moved=nbytes(left, right, input_grad, input_grad, lora_a, partial),
        flops=2 * right.numel() * left_features * (1 if input_grad is None else 2),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits == 1:
        return [product]
    return [product, split_sum.launch(partial, grad)]
