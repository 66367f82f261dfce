"""The second stage of a sum that several programs share: add their parts, round.

    grad[n] = round(Σ_s partial[n, s])

One program owns 1,024 elements of one record's gradient. It adds the parts in the order of s, in
float64, rounds to the type of the slab and stores. The order is fixed, so the result has the same
bits on every run; no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes
from .tiles import narrow, record_strides


@triton.jit
def _split_sum_kernel(
    partial_ptr,
    grad_ptr,
    grad_stride_n,
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


def launch(partial: Tensor, grad: Tensor) -> Launch:
    """partial float32 [N, S, ...] contiguous -> grad [N, ...]."""
    n_records, splits = partial.shape[:2]
    n_elements = grad.shape[1:].numel()
    return Launch(
        kernel=_split_sum_kernel,
        grid=(tiling.ceil_div(n_elements, tiling.ELEMENTS), n_records),
        arguments={
            "partial_ptr": partial,
            "grad_ptr": grad,
            "grad_stride_n": record_strides(grad),
            "S": splits,
            "E": n_elements,
        },
        constants={"BLOCK": tiling.ELEMENTS},
        bytes_moved=nbytes(partial, grad),
        flops=partial.numel(),
    )
