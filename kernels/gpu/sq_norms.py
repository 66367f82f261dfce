"""Squared norms of per-record gradients that lie in memory, partial over blocks of elements.

    sq_norms[n, m] = Σ_{e in block m} grad[n, e]²

One program owns one block of one record. Squares and sums are float64.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes
from .tiles import record_strides, sum_of_squares


@triton.jit
def _sq_norms_kernel(grads_ptr, grads_stride_n, sq_norms_ptr, E, BLOCK: tl.constexpr):
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grads = tl.load(grads_ptr + n * grads_stride_n + e, mask=e < E, other=0.0)
    tl.store(sq_norms_ptr + n * tl.num_programs(0) + block, sum_of_squares(grads))


def sq_norm_columns(n_elements: int) -> int:
    """Partial squared norms of each record that ``launches`` writes."""
    return tiling.ceil_div(n_elements, tiling.NORM_ELEMENTS)


def launches(grads: Tensor, sq_norms: Tensor) -> list[Launch]:
    """grads [N, ...] -> sq_norms float64 [N, M]."""
    n_elements = grads.shape[1:].numel()
    return [
        Launch(
            kernel=_sq_norms_kernel,
            grid=(sq_norm_columns(n_elements), len(grads)),
            arguments={
                "grads_ptr": grads,
                "grads_stride_n": record_strides(grads),
                "sq_norms_ptr": sq_norms,
                "E": n_elements,
            },
            constants={"BLOCK": tiling.NORM_ELEMENTS},
            bytes_moved=nbytes(grads, sq_norms),
            flops=2 * grads.numel(),
        )
    ]
