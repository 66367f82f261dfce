"""Each operation beside Opacus' formula for the same layer: pytest bench/test_kernels.py
--benchmark-only [--full]

A layer of the shipped UNet and one of SD 1.5's smallest, in float32; with ``--full`` larger ones.
On a GPU the kernels and the eager specification take turns with Opacus' formula, elsewhere the
specification, which is what dpengine runs there. What they return is compared before it is timed.
Kernels alone, from CUDA graphs and in narrower types, are measured by `bench.gpu`.
"""

from dataclasses import asdict
from typing import Any

import pytest

from . import layers, operations
from .operations import OPACUS, OURS, SLAB_OPS, Operation
from .shapes import LAYERS, N_VALUES, Shape

SHAPES = {"digits": Shape(64, 4, 16, 64, 64, 4), "sd15_8x8": LAYERS["sd15_8x8"]}
FULL_SHAPES = {name: LAYERS[name] for name in ("sd15_16x16", "sd15_text_320", "celeba_32x32")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        more = FULL_SHAPES if metafunc.config.getoption("--full") else {}
        pairs = [
            (op, name)
            for name, shape in (SHAPES | more).items()
            for op in layers.USED
            if layers.applies(op, shape)
        ]
        metafunc.parametrize(("op", "shape"), pairs)


def test_layer_op(answer, benchmark, full, op, shape):
    """How long does one op of a layer take, beside Opacus' formula and the machine's limit?"""
    sizes = (SHAPES | FULL_SHAPES)[shape]
    about = {"op": op, "shape": shape, **asdict(sizes)}
    operation = operations.of_layer(op, sizes)
    _measure(answer, benchmark, full, about, operation, upper_bound=op == "gram_sq_norms")


@pytest.mark.parametrize("op", SLAB_OPS)
def test_slab_op(answer, benchmark, full, op):
    """And the norms and the clipped sum of the gradients that SD 1.5's adapter has?"""
    n_values = N_VALUES["sd15_512"]
    about = {"op": op, "shape": f"16 x {n_values:,}"}
    _measure(answer, benchmark, full, about, operations.of_slab(op, 16, n_values))


def _measure(
    answer,
    benchmark,
    full: bool,
    about: dict[str, Any],
    operation: Operation,
    *,
    upper_bound: bool = False,
) -> None:
    verdicts = operations.examine(operation, upper_bound=upper_bound)
    assert "wrong" not in verdicts[OURS], verdicts[OURS]
    sound = [impl for impl, verdict in verdicts.items() if "wrong" not in verdict]
    turns, n_calls, n_products = operations.in_turns(operation, sound)
    benchmark.pedantic(turns.round, rounds=25 if full else 9)
    found = operations.compared(operation, turns, n_calls, n_products)
    entry = about | {"verdicts": verdicts} | found
    theirs = entry["over_ours"].get(OPACUS)
    answer(
        "ops",
        entry,
        f"{about['op']}, {about['shape']}: Opacus' formula takes "
        f"{'a wrong sum' if theirs is None else format(theirs['median'], '.2f')} of ours, which "
        f"reaches {entry['share_of_roofline'][OURS]['median']:.0%} of the roofline "
        f"({entry['bound_by']})",
    )
