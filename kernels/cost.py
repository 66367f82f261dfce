"""What each way to the norm and the clipped sum of one weight without a slab costs.

For one record whose gradient ``Σ_t left_tᵀ right_t`` is [L, D], over m = K·T rows:

    product  form it for the norm, keep nothing, form it again for the clipped sum
    gram     norms from Gram matrices of the rows, then form it for the clipped sum

Both read the rows twice, and keep them until the clip factors are known.
"""

from dataclasses import dataclass
from typing import Literal

Way = Literal["product", "gram"]


@dataclass(frozen=True)
class Machine:
    """Memory traffic and matrix products a device sustains, per second.

    The default is an H200's: 4.3 TB/s copied, 790 TFLOP/s in bfloat16, figures it is said to
    sustain; `bench.gpu` measures the first.
    """

    bytes_per_second: float = 4.3e12
    flops_per_second: float = 790e12


@dataclass(frozen=True)
class Cost:
    """Bytes moved and FLOPs for one record."""

    bytes_moved: int
    flops: int

    def seconds(self, machine: Machine) -> float:
        """The roofline: whichever of traffic and arithmetic takes longer."""
        return max(
            self.bytes_moved / machine.bytes_per_second, self.flops / machine.flops_per_second
        )


def ways(n_rows: int, left_features: int, right_features: int, itemsize: int) -> dict[Way, Cost]:
    """The cost of each way for one record, m = ``n_rows``, L, D, and ``itemsize`` bytes a value."""
    features, elements = left_features + right_features, left_features * right_features
    rows = n_rows * features * itemsize
    form = 2 * n_rows * elements
    return {
        "product": Cost(2 * rows, 2 * form + 4 * elements),
        "gram": Cost(2 * rows, 2 * n_rows**2 * (features + 1) + form + 2 * elements),
    }


def cheapest(
    n_rows: int,
    left_features: int,
    right_features: int,
    itemsize: int,
    machine: Machine | None = None,
) -> Way:
    """The faster way on ``machine``."""
    costs = ways(n_rows, left_features, right_features, itemsize)
    machine = machine or Machine()
    return min(costs, key=lambda way: (costs[way].seconds(machine), costs[way].flops))
