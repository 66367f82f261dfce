"""One kernel launch as data: it can be run, compiled ahead of time, and counted."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter; read, like Triton does, when they are defined."""

_MAX_GRID = 65_535  # CUDA's limit for all but the first axis


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and compile-time constants.

    ``bytes_moved``: what must travel to and from memory if everything is read and written once;
    ``flops``: multiplications and additions, padding not counted.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    bytes_moved: int
    flops: int
    num_warps: int = 4
    num_stages: int = 2

    def __call__(self) -> None:
        """Run it on the current stream of its tensors' device; an empty grid is no launch."""
        if not prod(self.grid):
            return
        if max(self.grid[1:], default=0) > _MAX_GRID:
            raise ValueError(
                f"a batch may have at most {_MAX_GRID} records, got a grid of {self.grid}; split it"
            )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run(launches: list[Launch]) -> None:
    """Run the launches of one op in their order."""
    for launch in launches:
        launch()


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type that products of ``dtype`` are taken in.

    Triton's interpreter multiplies the bit patterns of bfloat16: there float32 stands in.
    """
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements of ``tensors``, whatever lies between them."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
