"""A million hostile records in every mode and type: none contributes more than its bound.

Records of few elements are clipped a batch at a time, each in columns of its own, where all others
are 0 and so add exactly 0: the norm is the record's, and its columns of the sum are what it adds.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dpengine.mechanism.adaptive import Adaptive
from dpengine.mechanism.clipping import Automatic, Flat, PerLayer

MODES = {
    "flat": Flat,
    "tight": lambda bound: Automatic(bound, gamma=max(bound * 1e-12, 1e-300)),
    "automatic": Automatic,
    "layers": PerLayer,
    "adaptive": lambda bound: Adaptive(bound, count_noise_stddev=1.0),
}
SCALES = (1.0, 1 / 3, 64.0)
SMALL, TOGETHER = 32, 100
SHARES = ((SMALL, 0.99), (2**13, 0.0099), (2**20, 0.0001))
"""How long records are, at most, and how many of all."""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def hostile(kind: int, n: int, size: int, generator: torch.Generator) -> Tensor:
    """float32 [n, size] of one of five kinds."""
    rows = normal(generator, n, size)
    if kind == 1:  # all elements equal: every rounding goes the same way
        rows[:] = rows[:, :1]
    elif kind == 2:  # one giant, many dwarfs
        rows *= 1e-30
        rows[:, 0] = 1e38
    elif kind == 3:  # subnormal
        rows *= 1e-40
    elif kind == 4:  # from 1e-37 to 1e37
        rows *= 10.0 ** (74 * torch.rand(n, size, generator=generator) - 37)
    return rows


def scaled_to(bound: float, rows: Tensor) -> Tensor:
    """Rows whose norms are ``bound`` up to rounding, above it as often as below."""
    wanted = bound / rows.double().norm(dim=1, keepdim=True)
    return (rows.double() * wanted).to(rows.dtype)


def batches(
    count: int, dtype: torch.dtype, seed: int
) -> Iterator[tuple[Tensor, Tensor, float, float]]:
    """``count`` records in batches of one size: two tensors, a bound, a loss scale."""
    generator = torch.Generator().manual_seed(seed)
    longest = 1
    for limit, share in SHARES:
        done, wanted, number = 0, math.ceil(count * share), 0
        while done < wanted:
            n = TOGETHER if limit == SMALL else 1
            exponent = torch.rand((), generator=generator) * math.log2(limit / longest)
            size = max(2, int(longest * 2**exponent))
            rows = hostile(number % 5, n, size, generator)
            exact = rows[0].double().norm().item()
            nudge = 1 + 2.0**-40 * 2 ** (20 * torch.rand((), generator=generator).item())
            bound = exact / nudge
            if number % 2 and number % 5 != 3:  # all at a bound of their own
                bound = float(10 ** (3 * normal(generator, 1)))
                rows = scaled_to(bound, rows)
            scale = SCALES[number % 3]
            rows = (rows / scale).to(dtype)
            half = max(1, size // 3)
            yield rows[:, :half], rows[:, half:], max(bound, 1e-40), scale
            done, number = done + n, number + 1
        longest = limit


def apart(rows: Tensor) -> Tensor:
    """[n, size] -> [n, n·size], row i in the i-th of n blocks of columns, zeros elsewhere."""
    n, size = rows.shape
    blocks = rows.new_zeros(n, n, size)
    blocks[torch.arange(n), torch.arange(n)] = rows
    return blocks.flatten(1)


def contributions(tensors: list[Tensor], mode, scale: float) -> list[Tensor]:
    """What each record adds to the sum, in each tensor.  float64 [n, size] each"""
    n = len(tensors[0])
    columns = [apart(tensor) if n > 1 else tensor for tensor in tensors]
    everyone = torch.ones(n, dtype=torch.bool)
    values = mode.clip_and_sum(columns, everyone, loss_scale=scale).values
    return [part.view(n, -1) for part in values.split([c.shape[1] for c in columns])]


def exceeds(rows: Tensor, bound: float) -> bool:
    """Whether a row of ``rows`` has an L2 norm above ``bound``; where it is close, exactly.

    A float64 sum of up to 2²⁰ squares is off by less than 2⁻³² of itself and 1e-300.
    """
    squares = rows.square().sum(1)
    close = ~(squares * (1 + 2.0**-30) + 1e-300 <= bound * bound * (1 - 2.0**-50))
    return any(
        not row.isfinite().all()
        or sum(Fraction(value) ** 2 for value in row.tolist()) > Fraction(bound) ** 2
        for row in rows[close]
    )


def check(count: int, dtype: torch.dtype, mode_of, seed: int) -> None:
    for first, second, bound, scale in batches(count, dtype, seed):
        mode = mode_of(bound)
        parts = contributions([first, second], mode, scale)
        assert not exceeds(torch.cat(parts, 1), bound)
        if isinstance(mode, PerLayer):
            assert not any(exceeds(part, mode.group_bound(2)) for part in parts)
        if isinstance(mode, Adaptive):
            vote = mode.count([first[:1], second[:1]], torch.ones(1, dtype=torch.bool))
            assert abs(vote.values.item()) <= vote.sensitivity == 0.5


MODE = pytest.mark.parametrize("mode", MODES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@MODE
@DTYPE
def test_no_hostile_record_exceeds_its_bound(dtype, mode):
    check(2_000, dtype, MODES[mode], seed=0)


@pytest.mark.slow
@MODE
@DTYPE
def test_no_record_of_a_million_exceeds_its_bound(dtype, mode):
    check(1_000_000, dtype, MODES[mode], seed=1)


def test_one_unit_in_the_last_place_is_seen():
    assert not exceeds(torch.tensor([[3.0, 4.0]]).double(), 5.0)
    assert exceeds(torch.tensor([[0.0, 1.0], [3.0, 4.0]]).double(), math.nextafter(5.0, 0))
    assert exceeds(torch.tensor([[math.nan]]).double(), 5.0)


def test_records_apart_are_clipped_as_if_alone():
    rows = 10 * normal(torch.Generator().manual_seed(0), 7, 5)
    together = contributions([rows[:, :2], rows[:, 2:]], Flat(0.7), 1 / 3)
    for n in range(7):
        alone = contributions([rows[n : n + 1, :2], rows[n : n + 1, 2:]], Flat(0.7), 1 / 3)
        assert all(torch.equal(a[n], b[0]) for a, b in zip(together, alone, strict=True))


def test_hostile_records_lie_on_both_sides_of_their_bounds():
    above = below = 0
    for first, second, bound, scale in batches(4_000, torch.float32, seed=2):
        norms = torch.cat([first, second], 1).double().norm(dim=1) * scale
        near = norms[(norms / bound - 1).abs() < 1e-5]
        above, below = above + int((near > bound).sum()), below + int((near <= bound).sum())
    assert min(above, below) > 300
