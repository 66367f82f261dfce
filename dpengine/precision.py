"""Whether a backward pass rounds gradients below float32."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def autocast_is_on(like: Tensor) -> bool:
    """Whether operations on the device of ``like`` run in autocast's type now."""
    return torch.is_autocast_enabled(like.device.type)


def is_coarse(output: Any, like: Tensor) -> bool:
    """Whether a gradient of ``output`` passes through a type below float32 on its way back.

    Walks the graph behind ``output``, which tells the type of each gradient in it: autocast, a base
    or activations in half precision. On the GPU of ``like`` TF32 counts as well: it rounds what a
    product is given to 11 bits. What follows ``output``, the loss, is not seen.
    """
    if autocast_is_on(like) or (like.is_cuda and _has_tf32()):
        return True
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if any(data.dtype.itemsize < 4 for data in node._input_metadata):
            return True
        following = {following for following, _ in node.next_functions if following} - seen
        seen |= following
        waiting += following
    return False


def _has_tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
