"""Block sizes of the kernels that form products or work on vectors, as functions of shapes.

Chosen from the memory traffic (README.md) and from what `bench.compiler` shows of registers
and shared memory; no GPU has measured them yet.
"""

from dataclasses import dataclass

from ..checks import MAX_RANK

ELEMENTS = 1024
"""Elements of one program that works on flat vectors."""

NORM_ELEMENTS = 4096
"""Elements of one record that one program squares and sums."""

CLIP_BLOCK = (16, 256)
"""Records and elements that one program of the clipped sum loads at a time."""

KEYSTREAM_BLOCKS = 128
"""Blocks of 64 bytes of ChaCha20's keystream that one program makes, one for each lane."""

RECORDS = 4
"""Records whose clipped gradients one program adds up before its sum leaves the chip."""

ALL_ROWS = 1 << 62


@dataclass(frozen=True)
class Tiling:
    """Blocks of one program: ``block_t`` rows at a time, of ``rows`` in all, by l and d features.

    ``rows``: how many of a record's K·T rows one program sums; a multiple of ``block_t``.
    """

    block_t: int
    rows: int
    block_l: int
    block_d: int
    num_warps: int
    num_stages: int

    def splits(self, n_rows: int) -> int:
        """Programs that share the sum over a record's ``n_rows`` rows; at least one."""
        return max(1, ceil_div(n_rows, self.rows))

    def tiles(self, left_features: int, right_features: int) -> int:
        """Tiles of one record's gradient."""
        return ceil_div(left_features, self.block_l) * ceil_div(right_features, self.block_d)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pad(size: int) -> int:
    """The next power of two, at least the 16 that the tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def lora_forward(rank: int, itemsize: int) -> Tiling:
    """One program owns ``block_t`` rows of x and of the base output, and loops over features."""
    block_l = pad(rank)
    if itemsize == 4:
        return Tiling(32, 32, block_l, 32, 8, 2)
    block_t = 64 if block_l <= 64 else 32
    return Tiling(block_t, block_t, block_l, 64, 4, 3 if block_l <= 32 else 2)


def lora_side_b(rank: int, itemsize: int) -> Tiling:
    """One program owns ``block_t`` rows of g, and loops over features.

    The more rows it owns, the fewer partial gradients are written: 4 R bytes of them for every
    ``block_t`` · itemsize bytes of g. Registers for u end that at a high rank, and products in
    float32, which no tensor core takes at full precision, end it at any.
    """
    block_l = pad(rank)
    if itemsize == 4:
        return Tiling(32, 32, block_l, 32 if block_l <= 32 else 16, 8, 2)
    block_t = {16: 128, 32: 64, 64: 64}.get(block_l, 32)
    return Tiling(
        block_t, block_t, block_l, 64 if block_l <= 32 else 32, 4, 2 if block_l <= 64 else 1
    )


def product(left_features: int, itemsize: int) -> Tiling:
    """One program owns a tile of a record's gradient and sums 512 of the record's rows."""
    block_l = min(pad(left_features), MAX_RANK)
    if itemsize == 4:
        # At a rank that 16 divides, u is loaded in wide pieces, and other blocks stay in registers.
        wide = block_l == 128 and left_features % 16 == 0
        block_t = 16 if block_l in (32, 128) and not wide else 32
        num_warps = 4 if block_l in (32, 128) else 8
        return Tiling(block_t, 512, block_l, 16 if wide else 32, num_warps, 2)
    if block_l == 128:
        return Tiling(32, 512, block_l, 32, 4, 1)
    return Tiling(32 if block_l == 32 else 64, 512, block_l, 64, 4, 2)


def whole_product(left_features: int) -> Tiling:
    """One program owns a tile of a record's gradient and sums all of its rows."""
    block_l = min(pad(left_features), 64)
    return Tiling(32, ALL_ROWS, block_l, 64, 8, 2)


def gram() -> Tiling:
    """One program owns 32 x 32 pairs of a record's rows and loops over features."""
    return Tiling(32, 32, 32, 64, 4, 2)
