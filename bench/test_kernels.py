"""Each op beside Opacus' formula for the same layer: pytest bench/test_kernels.py --benchmark-only

A layer of the shipped UNet and one of SD 1.5's smallest. The kernels run where there is a GPU, the
eager specification everywhere. Read ratios of one run.
"""

from collections.abc import Callable

import pytest
import torch

from . import cases, timing
from .shapes import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"digits": Shape(64, 4, 16, 64, 64, 4), "sd15_8x8": Shape(16, 1, 64, 1280, 1280, 4)}
LAYER_OPS = ("lora_forward", "lora_side_b", "lora_side_a", "per_record_product")
IMPLS = ("eager", "opacus", "triton") if DEVICE == "cuda" else ("eager", "opacus")


def finished(call: Callable[[], object]) -> Callable[[], None]:
    """``call``, and the wait for a device that works on after it."""

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", LAYER_OPS)
def test_layer_op(benchmark, monkeypatch, op, impl, shape):
    monkeypatch.setattr(timing, "DEVICE", DEVICE)
    benchmark.group = f"{op} {shape}"
    calls, n_bytes = timing.layer_calls(op, impl, SHAPES[shape], torch.float32)
    benchmark.extra_info["bytes"] = n_bytes
    benchmark.pedantic(finished(calls[0]), rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("op", [op for op in cases.OPS if op not in LAYER_OPS])
def test_other_op(benchmark, op):
    benchmark.group = op
    impl = "triton" if DEVICE == "cuda" else "reference"
    inputs = cases.make_inputs(SHAPES["digits"], torch.float32, DEVICE)
    benchmark.pedantic(finished(lambda: cases.OPS[op](inputs, impl)), rounds=15, warmup_rounds=3)
