"""The second stage of a sum that several programs share: add their parts, round, square.

    grad[n] = round(Σ_s partial[n, s])        sq_norms[n] = Σ grad[n]²

One program owns 1,024 elements of one record's gradient. It adds the parts in the order of s, in
float64, rounds to the type of the slab, stores, and squares what it stored in float64. The order
is fixed, so the result has the same bits on every run; no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes
from .tiles import narrow, record_strides, sum_of_squares


@triton.jit
def _split_sum_kernel(
    partial_ptr,
    grad_ptr,
    grad_stride_n,
    sq_norms_ptr,
    S,
    E,
    BLOCK: tl.constexpr,
):
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for s in range(S):
        total += tl.load(partial_ptr + (n * S + s) * E + e, mask=e < E, other=0.0).to(tl.float64)
    stored = narrow(total.to(tl.float32), grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + n * grad_stride_n + e, stored, mask=e < E)
    tl.store(sq_norms_ptr + n * tl.num_programs(0) + block, sum_of_squares(stored))


def launch(partial: Tensor, grad: Tensor, sq_norms: Tensor) -> Launch:
    """partial float32 [N, S, ...] contiguous -> grad [N, ...], sq_norms float64 [N, M]."""
    n_records, splits = partial.shape[:2]
    n_elements = grad.shape[1:].numel()
    return Launch(
        kernel=_split_sum_kernel,
        grid=(tiling.split_sum_columns(n_elements), n_records),
        arguments={
            "partial_ptr": partial,
            "grad_ptr": grad,
            "grad_stride_n": record_strides(grad),
            "sq_norms_ptr": sq_norms,
            "S": splits,
            "E": n_elements,
        },
        constants={"BLOCK": tiling.ELEMENTS},
        bytes_moved=nbytes(partial, grad, sq_norms),
        flops=partial.numel() + 2 * grad.numel(),
    )
