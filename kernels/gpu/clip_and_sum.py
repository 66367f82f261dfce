"""Clip factors and the clipped sum over a slab of per-record gradients, in one launch.

    sum = Σ_n c[n] s grad[n],   c[n] = min(1, C / ‖s grad[n]‖) rounded down,   s = loss_scale

or, for automatic clipping, c[n] = C / (‖s grad[n]‖ + gamma).

One program owns BLOCK_E elements of the sum and walks over the records, BLOCK_N at a time, in a
fixed order, so the result has the same bits on every run. It finds the clip factors from the
squared norms as it goes, and adds in float64. Padding and records that are not finite are selected
away before they are multiplied. The slab is read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes
from .tiles import clip_factor, is_finite, record_strides


@triton.jit
def _clip_and_sum_kernel(
    grads_ptr,
    grads_stride_n,
    sq_norms_ptr,
    keep_ptr,
    sum_ptr,
    max_grad_norm: tl.float64,
    loss_scale: tl.float64,
    gamma: tl.float64,
    largest: tl.float64,
    N,
    E,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.float64)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        sq_norm = tl.load(sq_norms_ptr + n, mask=n < N, other=0.0) * (loss_scale * loss_scale)
        kept = tl.load(keep_ptr + n, mask=n < N, other=0) != 0
        kept = kept & is_finite(sq_norm)
        weight = loss_scale * clip_factor(sq_norm, max_grad_norm, gamma, largest)
        grads = tl.load(
            grads_ptr + n[:, None].to(tl.int64) * grads_stride_n + e[None, :],
            mask=kept[:, None] & (e[None, :] < E),
            other=0.0,
        )
        total += tl.sum(weight[:, None] * grads.to(tl.float64), axis=0)
    tl.store(sum_ptr + e, total, mask=e < E)


def launches(
    grads: Tensor,
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    total: Tensor,
    gamma: float = 0.0,
    largest: float = 1.0,
) -> list[Launch]:
    """grads [N, ...], sq_norms float64 [N], keep bool [N] -> total float64 [E].

    ``gamma`` is added to each norm, ``largest`` caps the factors; the defaults clip flat.
    """
    n_records, n_elements = len(sq_norms), total.numel()
    block_n, block_e = tiling.CLIP_BLOCK
    return [
        Launch(
            kernel=_clip_and_sum_kernel,
            grid=(tiling.ceil_div(n_elements, block_e),),
            arguments={
                "grads_ptr": grads,
                "grads_stride_n": record_strides(grads),
                "sq_norms_ptr": sq_norms,
                "keep_ptr": keep,
                "sum_ptr": total,
                "max_grad_norm": max_grad_norm,
                "loss_scale": loss_scale,
                "gamma": gamma,
                "largest": largest,
                "N": n_records,
                "E": n_elements,
            },
            constants={"BLOCK_N": block_n, "BLOCK_E": block_e},
            bytes_moved=nbytes(grads, sq_norms, keep, total),
            flops=2 * grads.numel(),
        )
    ]
