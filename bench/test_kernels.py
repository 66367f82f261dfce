"""Each op beside Opacus' formula for the same layer: pytest bench/test_kernels.py --benchmark-only

A layer of the shipped UNet and one of SD 1.5's smallest. The kernels run where there is a GPU, the
eager specification everywhere. Read ratios of one run.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from . import cases, layers
from .shapes import LAYERS, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"digits": Shape(64, 4, 16, 64, 64, 4), "sd15_8x8": LAYERS["sd15_8x8"]}
IMPLS = layers.IMPLS if DEVICE == "cuda" else ("eager", "opacus")
SLAB_OPS = ("sq_norms", "clip_and_sum", "add_noise")


def finished(call: Callable[[], object]) -> Callable[[], None]:
    """``call``, and the wait for a device that works on after it."""

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", layers.USED)
def test_layer_op(benchmark, op, impl, shape):
    benchmark.group = f"{op} {shape}"
    inputs = layers.make_inputs(op, SHAPES[shape], torch.float32, DEVICE)
    benchmark.extra_info["bytes"] = layers.bytes_of(op, inputs)
    call = partial(layers.caller(op, impl), inputs)
    benchmark.pedantic(finished(call), rounds=9, warmup_rounds=2)


@pytest.mark.parametrize("op", SLAB_OPS)
def test_slab_op(benchmark, op):
    benchmark.group = op
    impl = "triton" if DEVICE == "cuda" else "reference"
    inputs = cases.make_inputs(SHAPES["digits"], torch.float32, DEVICE)
    benchmark.pedantic(finished(lambda: cases.OPS[op](inputs, impl)), rounds=15, warmup_rounds=3)
