"""Which tensors of a module are trained, and how the rows of a batch are counted."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .layers import TrainedLayer


def trainable_parameters(
    module: nn.Module, layers: list[TrainedLayer]
) -> tuple[dict[str, nn.Parameter], list[int]]:
    """The trainable tensors in the module's order, and the number of the layer of each.

    Raises ValueError where there is none, TypeError for one that is not float32.
    """
    layer_of: dict[Tensor, int] = {}
    for number, layer in enumerate(layers):
        for param in layer.parameters:
            layer_of.setdefault(param, number)
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the module has no trainable tensor; add a LoRA adapter first")
    for name, param in trainable.items():
        check_dtype(name, param)
    return trainable, [layer_of[param] for param in trainable.values()]


def check_dtype(name: str, param: Tensor) -> None:
    """Raise TypeError unless ``param`` is float32."""
    if param.dtype != torch.float32:
        raise TypeError(
            f"trainable tensor {name!r} must be float32, got {param.dtype}: cast it before the "
            "module is captured and the optimizer made, as param.data = param.data.float(), or all "
            "with module.float(); of an adapter over a base in half precision the adapter alone, "
            "as diffusers.training_utils.cast_training_params does, and run under torch.autocast"
        )


def count_rows(arguments: tuple) -> int:
    """The first axis of the first tensor among the arguments of a module."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.ndim > 0:
            return len(argument)
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise ValueError(
        "the captured module was called without a tensor whose rows can be counted; give it one, "
        "whose first axis counts them"
    )
