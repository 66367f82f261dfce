"""What the checks use to find where a module mixes records: its parts, run and compared."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SAME = 1e-5
"""Relative difference up to which two runs gave the same; what rounding alone may cause."""

WAY_OUT = (
    "replace it: treat each row on its own, with GroupNorm or LayerNorm instead of a normalisation "
    "over the batch, and the rows along the first axis"
)


@dataclass(frozen=True)
class Call:
    """A call of a module, with copies of the tensors that went in and came out."""

    module: str
    inputs: list[Tensor] = field(repr=False)
    outputs: list[Tensor] = field(repr=False)


def run_parts(module: nn.Module, forward: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Every call of a module in the order in which they end, inner ones first; and the result."""
    calls: list[Call] = []
    begun: list[list[Tensor]] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begun.append(_copies((args, kwargs)))

    def end(who: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        calls.append(Call(who, begun.pop(), _copies(output)))

    with ExitStack() as hooks:
        for name, child in module.named_modules():
            for hook in (
                child.register_forward_pre_hook(begin, with_kwargs=True),
                child.register_forward_hook(partial(end, _who(name, child)), with_kwargs=True),
            ):
                hooks.callback(hook.remove)
        return calls, forward()


def _who(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"module {name!r}, a {kind}," if name else f"the whole model, a {kind},"


def _copies(tree: object) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def first_change(before: list[Call], after: list[Call], rows: Tensor) -> str | None:
    """The first module whose output changed in ``rows``, bool [N·K], and whose input did not.

    An output without rows, such as a mean, mixes nothing by itself.
    """
    for one, other in zip(before, after, strict=False):
        if one.module != other.module or len(one.inputs) != len(other.inputs):
            return None  # another way through the model
        outputs = zip(one.outputs, other.outputs, strict=False)
        inputs = zip(one.inputs, other.inputs, strict=True)
        if any(_has_rows(a, rows) and changed(a, b, rows) for a, b in outputs) and not any(
            changed(a, b, rows) for a, b in inputs
        ):
            return one.module
    return None


def _has_rows(tensor: Tensor, rows: Tensor) -> bool:
    """Whether ``tensor`` has one line, or several as for attention heads, for each row."""
    return tensor.ndim > 0 and len(tensor) > 0 and len(tensor) % len(rows) == 0


def changed(a: Tensor, b: Tensor, rows: Tensor) -> bool:
    """Whether two tensors differ in ``rows``; anywhere, where they have none."""
    if a.shape != b.shape:
        return True
    if _has_rows(a, rows):
        chosen = rows.repeat_interleave(len(a) // len(rows)).to(a.device)
        a, b = a[chosen], b[chosen]
    return float((a.double() - b.double()).norm()) > SAME * float(a.double().norm())


@contextmanager
def moved_off_init(params: list[nn.Parameter]) -> Iterator[None]:
    """Other values of ``params`` inside the context, the same bits as before after it.

    LoRA starts with lora_b = 0, where the gradient of lora_a vanishes and shows nothing. Autograd
    is not told of the change, so a graph of before stays good.
    """
    saved = [param.detach().clone() for param in params]
    generator = torch.Generator().manual_seed(0)
    for param in params:
        step = torch.randn(param.shape, generator=generator) / max((1, *param.shape)) ** 0.5
        param.data.add_(step.to(param))
    try:
        yield
    finally:
        for param, old in zip(params, saved, strict=True):
            param.data.copy_(old)


def randomness(module: str | None) -> str | None:
    return module and (
        f"{module} gives other outputs for the same inputs, as dropout does, whose generator is "
        "not secret: set it to 0"
    )


def mixing(module: str | None) -> str | None:
    return module and (
        f"{module} mixes the records of a batch, its output for one record changes with another; "
        f"{WAY_OUT}"
    )
