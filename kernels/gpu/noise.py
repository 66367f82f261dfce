"""The Gaussian mechanism in one pass: ChaCha20, Box-Muller and the division, no noise tensor.

    out = (values + noise_stddev · z) / divisor,   z standard normal

One program owns BLOCK blocks of the ChaCha20 keystream (RFC 8439), one lane each. The 16 words of
the state stay in registers, and the 64 bytes of a block become eight normals by
`reference.gaussians`: normal j of block b belongs to element ``j · n_blocks + b``, so that lanes
read and write neighbours. Everything but the words is float64. Key, counter and nonce are read from
memory: a captured graph draws fresh noise when its `stream` is overwritten.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .launch import Launch, nbytes

_TWO_PI = tl.constexpr(2 * math.pi)
_ROUND_INSTRUCTIONS = 8 * 12
_NORMAL_FLOPS = 100  # float64 logarithm, sine and cosine of a pair, halved; about


@triton.jit
def _rotate_left(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotate_left(d ^ a, 16)
    c += d
    b = _rotate_left(b ^ c, 12)
    a += b
    d = _rotate_left(d ^ a, 8)
    c += d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _word(low, high):
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _chacha20_block(stream_ptr, block):
    """The eight 64-bit words of keystream blocks ``block``, each uint64 [BLOCK]."""
    zero = block * 0
    k0 = tl.load(stream_ptr).to(tl.uint32, bitcast=True) + zero
    k1 = tl.load(stream_ptr + 1).to(tl.uint32, bitcast=True) + zero
    k2 = tl.load(stream_ptr + 2).to(tl.uint32, bitcast=True) + zero
    k3 = tl.load(stream_ptr + 3).to(tl.uint32, bitcast=True) + zero
    k4 = tl.load(stream_ptr + 4).to(tl.uint32, bitcast=True) + zero
    k5 = tl.load(stream_ptr + 5).to(tl.uint32, bitcast=True) + zero
    k6 = tl.load(stream_ptr + 6).to(tl.uint32, bitcast=True) + zero
    k7 = tl.load(stream_ptr + 7).to(tl.uint32, bitcast=True) + zero
    counter = tl.load(stream_ptr + 8).to(tl.uint32, bitcast=True) + block
    n0 = tl.load(stream_ptr + 9).to(tl.uint32, bitcast=True) + zero
    n1 = tl.load(stream_ptr + 10).to(tl.uint32, bitcast=True) + zero
    n2 = tl.load(stream_ptr + 11).to(tl.uint32, bitcast=True) + zero
    x0, x1, x2, x3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = counter, n0, n1, n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        _word(x0 + 0x61707865, x1 + 0x3320646E),
        _word(x2 + 0x79622D32, x3 + 0x6B206574),
        _word(x4 + k0, x5 + k1),
        _word(x6 + k2, x7 + k3),
        _word(x8 + k4, x9 + k5),
        _word(x10 + k6, x11 + k7),
        _word(x12 + counter, x13 + n0),
        _word(x14 + n1, x15 + n2),
    )


@triton.jit
def _gaussian_pair(radius_word, angle_word):
    """Two standard normals from two uniform words, by Box-Muller."""
    uniform = (radius_word.to(tl.float64) + 1.0) * (2.0**-64)
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    angle = angle_word.to(tl.float64) * (_TWO_PI * 2.0**-64)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _store_noisy(values_ptr, out_ptr, e, z, noise_stddev, divisor, P):
    value = tl.load(values_ptr + e, mask=e < P, other=0.0)
    tl.store(out_ptr + e, (value + noise_stddev * z) / divisor, mask=e < P)


@triton.jit
def _add_noise_kernel(
    values_ptr,
    stream_ptr,
    out_ptr,
    noise_stddev: tl.float64,
    divisor: tl.float64,
    P,
    n_blocks,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n_blocks = tl.cast(n_blocks, tl.int64)
    w0, w1, w2, w3, w4, w5, w6, w7 = _chacha20_block(stream_ptr, b.to(tl.uint32))
    z0, z4 = _gaussian_pair(w0, w4)
    z1, z5 = _gaussian_pair(w1, w5)
    z2, z6 = _gaussian_pair(w2, w6)
    z3, z7 = _gaussian_pair(w3, w7)
    # Lanes beyond the last block would write over the next normal's elements.
    e = tl.where(b < n_blocks, b, P)
    _store_noisy(values_ptr, out_ptr, e, z0, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + n_blocks, z1, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 2 * n_blocks, z2, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 3 * n_blocks, z3, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 4 * n_blocks, z4, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 5 * n_blocks, z5, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 6 * n_blocks, z6, noise_stddev, divisor, P)
    _store_noisy(values_ptr, out_ptr, e + 7 * n_blocks, z7, noise_stddev, divisor, P)


@triton.jit
def _chacha20_words_kernel(stream_ptr, words_ptr, n_blocks, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3, w4, w5, w6, w7 = _chacha20_block(stream_ptr, b.to(tl.uint32))
    word_ptrs, mask = words_ptr + b * 8, b < n_blocks
    tl.store(word_ptrs, w0.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 1, w1.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 2, w2.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 3, w3.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 4, w4.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 5, w5.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 6, w6.to(tl.int64, bitcast=True), mask=mask)
    tl.store(word_ptrs + 7, w7.to(tl.int64, bitcast=True), mask=mask)


def launches(
    values: Tensor, stream: Tensor, noise_stddev: float, divisor: float, out: Tensor
) -> list[Launch]:
    """values float64 [P], stream int32 [12] -> out float64 [P]."""
    n_blocks = tiling.ceil_div(values.numel(), 8)
    return [
        Launch(
            kernel=_add_noise_kernel,
            grid=(tiling.ceil_div(n_blocks, tiling.KEYSTREAM_BLOCKS),),
            arguments={
                "values_ptr": values,
                "stream_ptr": stream,
                "out_ptr": out,
                "noise_stddev": noise_stddev,
                "divisor": divisor,
                "P": values.numel(),
                "n_blocks": n_blocks,
            },
            constants={"BLOCK": tiling.KEYSTREAM_BLOCKS},
            bytes_moved=nbytes(values, stream, out),
            flops=n_blocks * (10 * _ROUND_INSTRUCTIONS + 8 * _NORMAL_FLOPS),
        )
    ]


def words_launches(stream: Tensor, words: Tensor) -> list[Launch]:
    """stream int32 [12] -> words int64 [n_blocks, 8], the keystream itself."""
    n_blocks = len(words)
    return [
        Launch(
            kernel=_chacha20_words_kernel,
            grid=(tiling.ceil_div(n_blocks, tiling.KEYSTREAM_BLOCKS),),
            arguments={"stream_ptr": stream, "words_ptr": words, "n_blocks": n_blocks},
            constants={"BLOCK": tiling.KEYSTREAM_BLOCKS},
            bytes_moved=nbytes(stream, words),
            flops=n_blocks * 10 * _ROUND_INSTRUCTIONS,
        )
    ]
