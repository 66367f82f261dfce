"""The forward pass of a LoRA adapter, added to the base layer's output in one launch.

    h = x Aᵀ                        [R]      kept for the backward pass
    base_output += s h Bᵀ           [O]

One program owns BLOCK_T rows. It reads its rows of x once to form h in registers, stores h, then
walks over the output features and adds to each tile of the base output.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import is_flat, load_rows, narrow, row_offsets, row_strides


@triton.jit
def _lora_forward_kernel(
    x_ptr,
    x_stride_row,
    x_stride_t,
    x_stride_f,
    a_ptr,
    a_stride_r,
    a_stride_i,
    b_ptr,
    b_stride_o,
    b_stride_r,
    y_ptr,
    y_stride_row,
    y_stride_t,
    y_stride_f,
    h_ptr,
    h_stride_row,
    h_stride_t,
    h_stride_f,
    scaling,
    K,
    T,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    q = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    n = tl.zeros((), dtype=tl.int64)
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(0, I, BLOCK_F):
        i = first + tl.arange(0, BLOCK_F)
        x = load_rows(x_ptr, x_stride_row, x_stride_t, x_stride_f, n, q, i, K, T, I, FLAT)
        a = tl.load(
            a_ptr + r[None, :] * a_stride_r + i[:, None] * a_stride_i,
            mask=(r[None, :] < R) & (i[:, None] < I),
            other=0.0,
        )
        h = tl.dot(x.to(COMPUTE), narrow(a, x.dtype).to(COMPUTE), h, input_precision="ieee")
    h_rounded = narrow(h, h_ptr.dtype.element_ty)
    rows = row_offsets(h_stride_row, h_stride_t, n, q, K, T, FLAT)
    h_ptrs = h_ptr + rows[:, None] + r[None, :].to(tl.int64) * h_stride_f
    tl.store(h_ptrs, h_rounded, mask=(q[:, None] < K * T) & (r[None, :] < R))

    rows = row_offsets(y_stride_row, y_stride_t, n, q, K, T, FLAT)
    for first in range(0, O, BLOCK_F):
        o = first + tl.arange(0, BLOCK_F)
        b = tl.load(
            b_ptr + r[:, None] * b_stride_r + o[None, :] * b_stride_o,
            mask=(r[:, None] < R) & (o[None, :] < O),
            other=0.0,
        )
        b_rounded = narrow(b, h_rounded.dtype).to(COMPUTE)
        update = scaling * tl.dot(h_rounded.to(COMPUTE), b_rounded, input_precision="ieee")
        y_ptrs = y_ptr + rows[:, None] + o[None, :].to(tl.int64) * y_stride_f
        mask = (q[:, None] < K * T) & (o[None, :] < O)
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + update
        tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def launches(
    base_output: Tensor,
    activations: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    h: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launch of the forward pass.

    base_output [N·K, T, O] (added to), activations [N·K, T, I], lora_a [R, I], lora_b [O, R] ->
    h [N·K, T, R].
    """
    rows, tokens, rank = h.shape
    tile = tile or tiling.lora_forward(rank, activations.element_size())
    return [
        Launch(
            kernel=_lora_forward_kernel,
            grid=(tiling.ceil_div(rows * tokens, tile.block_t),),
            arguments={
                "x_ptr": activations,
                **row_strides("x", activations),
                "a_ptr": lora_a,
                "a_stride_r": lora_a.stride(0),
                "a_stride_i": lora_a.stride(1),
                "b_ptr": lora_b,
                "b_stride_o": lora_b.stride(0),
                "b_stride_r": lora_b.stride(1),
                "y_ptr": base_output,
                **row_strides("y", base_output),
                "h_ptr": h,
                **row_strides("h", h),
                "scaling": scaling,
                "K": rows,
                "T": tokens,
                "I": activations.shape[-1],
                "O": base_output.shape[-1],
                "R": rank,
            },
            constants={
                "BLOCK_T": tile.block_t,
                "BLOCK_F": tile.block_d,
                "BLOCK_R": tile.block_l,
                "FLAT": is_flat(rows, activations, base_output, h),
                "COMPUTE": compute_dtype(activations.dtype),
            },
            bytes_moved=nbytes(activations, base_output, base_output, h, lora_a, lora_b),
            flops=2 * rank * (activations.numel() + base_output.numel()),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    ]
