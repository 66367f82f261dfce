"""Modules that cannot be trained privately, as can be told without running them.

What a forward pass writes is seen by ``watch``. That each record's gradient is its own is checked
by running the model on synthetic rows (``selfcheck``).
"""

from torch import nn


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
