"""What of a module is trained, and modules that cannot be trained privately, told without a pass.

What a forward pass writes is seen by ``watch``. That each record's gradient is its own is checked
by running the model on synthetic rows (``selfcheck``).
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .layers import TrainedLayer


def refuse_unsound_modules(module: nn.Module) -> None:
    """Raise ValueError for a module that mixes records, keeps them, or draws at random."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            raise ValueError(
                f"module {name!r} has dropout {child.p}, drawn from a generator that is not "
                "secret; set its p to 0"
            )
        for attribute in ("dropout", "dropout_prob"):  # MultiheadAttention, RNNs, DiT's labels
            value = vars(child).get(attribute, 0)
            if isinstance(value, int | float) and value > 0:
                raise ValueError(
                    f"module {name!r} has {attribute} {value}, drawn from a generator that is not "
                    "secret; set it to 0"
                )
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None:
            raise ValueError(
                f"embedding {name!r} has max_norm, which rewrites its weights by the private ids; "
                "set it to None"
            )
        if isinstance(child, nn.modules.instancenorm._InstanceNorm) and child.track_running_stats:
            raise ValueError(
                f"module {name!r} keeps running statistics of private records; set "
                "track_running_stats=False"
            )
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not _is_held(child):
            raise ValueError(
                f"module {name!r} is a {type(child).__name__}, which mixes the records of a batch; "
                "replace it by GroupNorm, or freeze it and hold it in eval mode: after each "
                "train() of the model call its eval()"
            )


def _is_held(batch_norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether it scales by constants: a pass in training mode would write its statistics."""
    frozen = not any(param.requires_grad for param in batch_norm.parameters())
    return frozen and not batch_norm.training and batch_norm.running_mean is not None


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
