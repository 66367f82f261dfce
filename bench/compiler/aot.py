"""Compiling a kernel launch ahead of time, without a GPU, and what the compiler made of it."""

import re
import subprocess
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpengine.kernels.gpu.launch import INTERPRETED, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_TRIGONOMETRY_STACK = 64
"""Bytes of stack that libdevice's float64 sine and cosine take for their rare large arguments."""

_COMPILED: dict[tuple, "Compiled"] = {}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a multiprocessor: per thread registers and spilled bytes, per block
    shared bytes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def at_least(self, other: "Compiled") -> "Compiled":
        """The larger of each figure."""
        return Compiled(*map(max, astuple(self), astuple(other)))


def compile_launch(launch: Launch, target: GPUTarget) -> Compiled:
    """What the compiler makes of the launch on its first call; tensors may lie on `meta`."""
    source, settings = _source(launch)
    key = (launch.kernel.__name__, target, launch.num_warps, launch.num_stages, settings)
    if key not in _COMPILED:
        compiled = _compile(source, launch, target)
        if target.backend == "hip":
            found = _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
        else:
            allowed = "__internal_trig_reduction" in compiled.asm["ptx"]
            stack = _TRIGONOMETRY_STACK if allowed else 0
            found = _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared, stack)
        _COMPILED[key] = found
    return _COMPILED[key]


def intermediate_code(launch: Launch) -> str:
    """Triton's own intermediate code of the launch, where the types of all integers stand."""
    return _compile(_source(launch)[0], launch, TARGETS["sm_90"]).asm["ttir"]


def _source(launch: Launch) -> tuple[ASTSource, str]:
    """The kernel with its arguments' types, as Triton specialises it, and those as text."""
    if INTERPRETED:
        raise RuntimeError("interpreted kernels cannot be compiled; unset TRITON_INTERPRET")
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name)
        if parameter.name in launch.constants or value is None or _is_one(value):
            signature[parameter.name] = "constexpr"
            constants.setdefault(parameter.name, value)
            continue
        signature[parameter.name] = _type(value, parameter.annotation_type)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    settings = repr((signature, constants, attributes))
    return ASTSource(launch.kernel, signature, constants, attributes), settings


def _compile(source: ASTSource, launch: Launch, target: GPUTarget) -> Any:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=target, options=options)


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _type(value: Tensor | int | float, annotation: str) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return annotation or "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _nvidia_resources(cubin: bytes, shared: int, stack_allowed: int) -> Compiled:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    stack = found["STACK"] + found["LOCAL"]
    return Compiled(found["REG"], 0 if stack <= stack_allowed else stack, shared)


def _amd_resources(assembly: str, shared: int) -> Compiled:
    found = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return Compiled(found["vgpr_count"], 4 * spills, shared)
