"""What the kernels share: loading rows of a record, forming its product, squares, clip factors.

Every loop over tokens runs in the same order with the same tile, so that two kernels that call
``product_tile`` with the same constants get the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def row_strides(name: str, x: Tensor) -> dict[str, int]:
    """The strides of ``x`` [N·K, T, F] as the kernel arguments of operand ``name``."""
    row, token, feature = x.stride()
    return {f"{name}_stride_row": row, f"{name}_stride_t": token, f"{name}_stride_f": feature}


def is_flat(draws: int, *tensors: Tensor | None) -> bool:
    """Whether in each [N·K, T, F] all K·T rows of a record follow one another evenly."""
    return draws == 1 or all(t is None or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors)


def record_strides(grad: Tensor) -> int:
    """Stride between the records of per-record gradients, each of which must be contiguous."""
    if not grad[:1].is_contiguous():
        raise ValueError(
            "out must hold each record's gradient in one piece, got strides "
            f"{tuple(grad.stride())} for shape {tuple(grad.shape)}"
        )
    return grad.stride(0)


@triton.jit
def load_rows(
    ptr,
    stride_row,
    stride_t,
    stride_f,
    n,
    q,
    f,
    K,
    T,
    F,
    FLAT: tl.constexpr,
):
    """Tile [len(q), len(f)] of features ``f`` at the rows ``q`` < K·T of record n; 0 beyond."""
    offsets = row_offsets(stride_row, stride_t, n, q, K, T, FLAT)
    mask = (q[:, None] < K * T) & (f[None, :] < F)
    pointers = ptr + offsets[:, None] + f[None, :].to(tl.int64) * stride_f
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def row_offsets(stride_row, stride_t, n, q, K, T, FLAT: tl.constexpr):
    """Element offsets of rows ``q`` of record n: draw q // T, token q % T."""
    if FLAT:
        offsets = n * K * stride_row + q.to(tl.int64) * stride_t
    else:
        offsets = (n * K + q // T) * stride_row + (q % T).to(tl.int64) * stride_t
    return offsets


@triton.jit
def product_tile(
    left_ptr,
    left_stride_row,
    left_stride_t,
    left_stride_f,
    right_ptr,
    right_stride_row,
    right_stride_t,
    right_stride_f,
    n,
    l,  # noqa: E741
    d,
    K,
    T,
    L,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``Σ_q right[n,q]ᵀ left[n,q]`` over all rows of record n.  float32 [BLOCK_D, BLOCK_L]"""
    total = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float32)
    for first in range(0, K * T, BLOCK_T):
        q = first + tl.arange(0, BLOCK_T)
        left = load_rows(
            left_ptr, left_stride_row, left_stride_t, left_stride_f, n, q, l, K, T, L, FLAT
        )
        right = load_rows(
            right_ptr, right_stride_row, right_stride_t, right_stride_f, n, q, d, K, T, D, FLAT
        )
        # TF32 rounds norms down as easily as up, and a low norm breaks the clip bound.
        total = tl.dot(tl.trans(right.to(COMPUTE)), left.to(COMPUTE), total, input_precision="ieee")
    return total


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """``values`` rounded to nearest even in ``dtype``."""
    if _INTERPRETED and values.dtype == tl.float32 and dtype == tl.bfloat16:
        # The interpreter truncates here, which the hardware does not.
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        nearest = tl.where(values == values, nearest, bits)
        values = nearest.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def sum_of_squares(values):
    """Sum of squares of a float32 tile in float64, where the squares are exact."""
    wide = values.to(tl.float64)
    return tl.sum(tl.ravel(wide * wide))


@triton.jit
def clip_factor(sq_norm, max_grad_norm, gamma=0.0, largest=1.0):
    """``reference.clip_factors`` for float64 norms, bit for bit; the defaults clip flat."""
    # In one expression: the interpreter would round a scalar to float32 between two.
    wanted = tl.minimum(max_grad_norm * (1 - 2.0**-22) / (tl.sqrt(sq_norm) + gamma), largest)
    factor = (wanted.to(tl.int64, bitcast=True) & -(2**29)).to(tl.float64, bitcast=True)
    return tl.where(is_finite(sq_norm), factor, 0.0)


@triton.jit
def is_finite(x):
    """Whether a float64 is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")
