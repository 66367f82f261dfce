"""What the compiler makes of every kernel, without a GPU: python -m bench.compiler

For each kernel, type, rank and target: registers of a thread, spilled bytes, shared memory
of a block, the most over the layer shapes of SD 1.5 and SDXL. For each launch at those shapes:
bytes, FLOPs, and the time that an H200 would need at least. Writes bench/results/compile.json.
Nothing here was run on a device.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product

import torch
import triton

from dpengine.kernels.cost import Cost, Machine

from ..results import FOLDER, commit
from ..shapes import LAYERS, MODELS, N_VALUES
from .aot import TARGETS, Compiled, compile_launch
from .launches import launches, slab_launches

RESULTS = FOLDER / "compile.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RANKS = (4, 16, 17, 32, 33, 64, 127, 128)
"""Whole tiles and what fits them worst: a rank that 16 does not divide is loaded value by value."""


def model_launches(model: str, dtype: torch.dtype, rank: int = 4) -> list[tuple[str, str, list]]:
    """Op, layer and launches of every layer of a model."""
    return [
        (op, layer, found)
        for layer in MODELS[model]
        for op, found in launches(replace(LAYERS[layer], rank=rank), dtype).items()
    ]


def resources(
    models: Iterable[str] = tuple(N_VALUES),
    dtypes: Iterable[str] = tuple(DTYPES),
    ranks: Iterable[int] = RANKS,
    targets: Iterable[str] = tuple(TARGETS),
) -> list[dict]:
    """The most registers, spilled and shared bytes that a kernel takes, over all shapes."""
    most: dict[tuple, Compiled] = {}
    for model, dtype in product(models, dtypes):
        named = [
            (rank, launch)
            for rank in ranks
            for _, _, found in model_launches(model, DTYPES[dtype], rank)
            for launch in found
        ]
        slab = slab_launches(16, N_VALUES[model], DTYPES[dtype])
        named += [(None, found[0]) for found in slab.values()]
        for (rank, launch), target in product(named, targets):
            key = (launch.kernel.__name__.strip("_"), dtype, rank, target, launch.num_warps)
            compiled = compile_launch(launch, TARGETS[target])
            most[key] = compiled.at_least(most.get(key, compiled))
    names = ("kernel", "dtype", "rank", "target", "warps")
    return [dict(zip(names, key, strict=True)) | asdict(worst) for key, worst in most.items()]


def rooflines() -> list[dict]:
    """Bytes, FLOPs and least time of each launch, bfloat16, rank 4, 16 records."""
    rows, machine = [], Machine()
    for model, n_values in N_VALUES.items():
        named = model_launches(model, torch.bfloat16)
        named += [(op, None, found) for op, found in slab_launches(16, n_values).items()]
        for op, layer, found in named:
            for launch in found:
                seconds = Cost(launch.bytes_moved, launch.flops).seconds(machine)
                rows.append(
                    {
                        "model": model,
                        "op": op,
                        "kernel": launch.kernel.__name__.strip("_"),
                        "layer": layer,
                        "grid": launch.grid,
                        "bytes": launch.bytes_moved,
                        "flops": launch.flops,
                        "roofline_us": round(1e6 * seconds, 2),
                    }
                )
    return rows


def main() -> None:
    compiled, least = resources(), rooflines()
    report = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "roofline": asdict(Machine()),
        "resources": compiled,
        "launches": least,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(_one_row_per_line(report), encoding="utf-8")

    print(f"{'kernel':28}{'dtype':10}{'rank':>5}  {'target':8}{'warps':>5}{'regs':>6}", end="")
    print(f"{'spilled':>9}{'shared':>8}")
    for row in compiled:
        print(
            f"{row['kernel']:28}{row['dtype']:10}{row['rank'] or '':>5}  "
            f"{row['target']:8}{row['warps']:>5}{row['registers']:>6}{row['spilled_bytes']:>9}"
            f"{row['shared_bytes']:>8}"
        )
    print(f"\n{'model':11}{'op':20}{'kernel':28}{'layer':15}{'MB':>9}{'GFLOP':>9}{'least us':>10}")
    for row in least:
        print(
            f"{row['model']:11}{row['op']:20}{row['kernel']:28}"
            f"{row['layer'] or '':15}{row['bytes'] / 1e6:>9.1f}{row['flops'] / 1e9:>9.2f}"
            f"{row['roofline_us']:>10}"
        )
    spilled = [row for row in compiled if row["spilled_bytes"]]
    print(f"\n{len(compiled)} kernels compiled, {len(spilled)} spill; written to {RESULTS}")
    sys.exit(1 if any(row["target"] != "gfx942" for row in spilled) else 0)


def _one_row_per_line(report: dict) -> str:
    lines = []
    for key, value in report.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
