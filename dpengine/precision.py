"""Whether a backward pass rounds gradients below float32."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def autocast_is_on(like: Tensor) -> bool:
    """Whether operations on the device of ``like`` run in autocast's type now."""
    return torch.is_autocast_enabled(like.device.type)


def note_rounding(
    output: Any, like: Tensor, n_rows: int, note: Callable[[bool | Tensor], None]
) -> None:
    """Tell ``note`` whether a gradient is rounded below float32 on its way back to ``output``.

    Told at once: what passes through a shorter type in the graph behind ``output``, which has the
    type of each gradient (autocast, a base or activations in half precision), and products that are
    given float32 and round it, on the device of ``like`` (TF32, or bfloat16 on a CPU). Told in the
    backward pass: what a loss outside of the module sends, where all of it has no more bits than
    float16 or TF32. A loss that rounds so and multiplies afterwards is not seen.
    """
    if autocast_is_on(like) or _rounds_products(like) or _has_short_types(output):
        note(True)
        return
    for tensor in _tensors(output):
        if tensor.grad_fn is not None and tensor.dtype == torch.float32:
            tensor.register_hook(lambda grad: note(_is_short(grad, n_rows)))


def _has_short_types(output: Any) -> bool:
    waiting = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if any(data.dtype.itemsize < 4 for data in node._input_metadata):
            return True
        following = {following for following, _ in node.next_functions if following} - seen
        seen |= following
        waiting += following
    return False


def _is_short(grad: Tensor, n_rows: int) -> Tensor | bool:
    """Whether no value has any of the last 13 bits of float32, and some have others before them.

    In float32 ``g / n`` has some for almost any g. Not asked where n is a power of two, which
    rounds nothing.
    """
    if n_rows & (n_rows - 1) == 0:
        return False
    bits = grad.detach().contiguous().view(torch.int32)
    return (bits & 0x7FFFFF != 0).any() & (bits & 0x1FFF == 0).all()


def _tensors(output: Any) -> list[Tensor]:
    if is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _rounds_products(like: Tensor) -> bool:
    backends = torch.backends
    if like.is_cuda:
        parts = backends.cuda.matmul, backends.cudnn.conv
    else:
        parts = backends.mkldnn.matmul, backends.mkldnn.conv
    return any(part.fp32_precision in ("tf32", "bf16") for part in parts)
