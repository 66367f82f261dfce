"""Side A of a LoRA convolution: the per-record gradient of A without an unfolded image.

    grad_a[n, r, c, i, j] = Σ_p u[n, p, r] x[n, c, p · stride - padding + (i, j) · dilation]

p over all K·H'·W' pixels of record n's u, each a pair (row, column); x is 0 outside the image.

For one tap (i, j) of the kernel this is a product over pixels, like side A of a linear layer, with
x read through a shifted window. One program owns BLOCK_C channels of one tap of one record's
gradient and a fixed number of the record's pixels. Where one program holds all pixels, it rounds
the tile to the type of the slab and stores it; otherwise it stores a partial sum that `split_sum`
finishes. x is read once for each tap; the taps of one channel tile are neighbours in the grid,
close in time. u is read once for each channel tile and tap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split_sum, tiling
from .launch import Launch, compute_dtype, nbytes
from .tiles import narrow, record_strides


@triton.jit
def _lora_conv_kernel(
    u_ptr,
    u_stride_row,
    u_stride_r,
    u_stride_h,
    u_stride_w,
    x_ptr,
    x_stride_row,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    grad_ptr,
    grad_stride_n,
    grad_stride_split,
    step_h,
    step_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    K,
    R,
    C,
    H,
    W,
    U_H,
    U_W,
    TAPS: tl.constexpr,
    TAPS_W: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tap, block = tile % TAPS, tile // TAPS
    tiles_c = tl.cdiv(C, BLOCK_C)
    r = (block // tiles_c) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (block % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = (tap // TAPS_W) * dilation_h - padding_h
    left = (tap % TAPS_W) * dilation_w - padding_w
    u_ptrs = u_ptr + r[None, :].to(tl.int64) * u_stride_r
    x_ptrs = x_ptr + c[None, :].to(tl.int64) * x_stride_c

    area = U_H * U_W
    grad = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for first in range(split * PIXELS, tl.minimum((split + 1) * PIXELS, K * area), BLOCK_P):
        q = first + tl.arange(0, BLOCK_P)
        row = n * K + q // area
        u_h, u_w = (q % area) // U_W, (q % area) % U_W
        u_pixels = row * u_stride_row + u_h.to(tl.int64) * u_stride_h
        u_pixels += u_w.to(tl.int64) * u_stride_w
        u_mask = (q[:, None] < K * area) & (r[None, :] < R)
        u = tl.load(u_ptrs + u_pixels[:, None], mask=u_mask, other=0.0)

        h, w = u_h * step_h + top, u_w * step_w + left
        inside = (q < K * area) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_pixels = row * x_stride_row + h.to(tl.int64) * x_stride_h
        x_pixels += w.to(tl.int64) * x_stride_w
        x_mask = inside[:, None] & (c[None, :] < C)
        x = tl.load(x_ptrs + x_pixels[:, None], mask=x_mask, other=0.0)
        # TF32 rounds norms down as easily as up, and a low norm breaks the clip bound.
        grad = tl.dot(tl.trans(x.to(COMPUTE)), u.to(COMPUTE), grad, input_precision="ieee")

    in_tile = (c[:, None] < C) & (r[None, :] < R)
    offsets = (r[None, :].to(tl.int64) * C + c[:, None]) * TAPS + tap
    grad_ptrs = grad_ptr + n * grad_stride_n + split.to(tl.int64) * grad_stride_split + offsets
    stored = narrow(grad, grad_ptr.dtype.element_ty)
    tl.store(grad_ptrs, stored, mask=in_tile)


def tile_of(rank: int, taps: int, itemsize: int) -> tiling.Tiling:
    """One program owns a channel tile of one tap and sums 512 pixels for each of the taps.

    A partial gradient is ``taps`` times as large as that of a linear layer for the same x, and
    there are ``taps`` times as many programs: so many times more pixels keep both as they are.
    Larger tiles spill registers: each element of a tile has a 64-bit address of its own.
    """
    block_l = min(tiling.pad(rank), tiling.MAX_RANK)
    if itemsize > 2:
        return tiling.Tiling(16, 512 * taps, block_l, 32, 4, 2)
    return tiling.Tiling(32, 512 * taps, block_l, 64, 4 if block_l <= 64 else 8, 3)


def launches(
    activations: Tensor,
    u: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    grad_a: Tensor,
    tile: tiling.Tiling | None = None,
) -> list[Launch]:
    """The launches of side A of a convolution.

    activations [N·K, C, H, W], u [N·K, R, H', W'] -> grad_a [N, R, C, kh, kw].
    """
    n_records, rank, channels, taps_h, taps_w = grad_a.shape
    taps, draws = taps_h * taps_w, len(u) // max(n_records, 1)
    height, width = activations.shape[2:]
    u_height, u_width = u.shape[2:]
    tile = tile or tile_of(rank, taps, activations.element_size())
    splits = tile.splits(draws * u_height * u_width)
    partial = grad_a.unsqueeze(1)
    if splits > 1:
        partial = grad_a.new_empty((n_records, splits, *grad_a.shape[1:]), dtype=torch.float32)
    conv = Launch(
        kernel=_lora_conv_kernel,
        grid=(tile.tiles(rank, channels) * taps, splits, n_records),
        arguments={
            "u_ptr": u,
            **_image_strides("u", "r", u),
            "x_ptr": activations,
            **_image_strides("x", "c", activations),
            "grad_ptr": partial,
            "grad_stride_n": record_strides(grad_a) if splits == 1 else partial.stride(0),
            "grad_stride_split": partial.stride(1),
            "step_h": stride[0],
            "step_w": stride[1],
            "padding_h": padding[0],
            "padding_w": padding[1],
            "dilation_h": dilation[0],
            "dilation_w": dilation[1],
            "K": draws,
            "R": rank,
            "C": channels,
            "H": height,
            "W": width,
            "U_H": u_height,
            "U_W": u_width,
        },
        constants={
            "TAPS": taps,
            "TAPS_W": taps_w,
            "PIXELS": tile.rows,
            "BLOCK_P": tile.block_t,
            "BLOCK_R": tile.block_l,
            "BLOCK_C": tile.block_d,
            "COMPUTE": compute_dtype(activations.dtype),
        },
        bytes_moved=nbytes(activations, u, partial),
        flops=2 * u.numel() * channels * taps,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits == 1:
        return [conv]
    return [conv, split_sum.launch(partial, grad_a)]


def _image_strides(name: str, channel: str, x: Tensor) -> dict[str, int]:
    axes = ("row", channel, "h", "w")
    return {f"{name}_stride_{axis}": s for axis, s in zip(axes, x.stride(), strict=True)}
