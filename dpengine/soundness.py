"""What a module must not do while records pass through it.

Some of it can be told from the modules alone, some only when a forward pass has run. That each
record's gradient is its own is checked by running the model on synthetic rows (``selfcheck``).
"""

import torch
from torch import nn

from .errors import PrivacyError


class Watch:
    """Sees what forward passes of ``module`` leave behind in the buffers that it has now."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = [
            (name, child._buffers) for name, child in module.named_modules() if child._buffers
        ]

    def begin(self) -> None:
        """Look before a forward pass."""
        self._before = self._buffers()
        self._generators = _generator_state()

    def check(self) -> None:
        """Raise PrivacyError where a buffer was written or replaced, or a random number drawn."""
        for name, state in self._buffers().items():
            if self._before.get(name) != state:
                raise PrivacyError(
                    f"the forward pass wrote into the buffer {name!r}, which would carry private "
                    "values out of it without noise: put the module that does so in eval mode"
                )
        if self._generators != _generator_state():
            raise PrivacyError(
                "the forward pass drew from torch's generator, which is not secret; draw noise, "
                "timesteps and masks before it, from SecureRandom, and set dropout to 0"
            )

    def _buffers(self) -> dict[str, tuple[int, int]]:
        return {
            f"{owner}.{name}" if owner else name: (id(buffer), buffer._version)
            for owner, buffers in self._owners
            for name, buffer in buffers.items()
            if buffer is not None
        }


def _generator_state() -> tuple[bytes, list[int]]:
    """What changes when a random number is drawn from torch's generators."""
    offsets = []
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        offsets = [generator.get_offset() for generator in torch.cuda.default_generators]
    return torch.get_rng_state().numpy().tobytes(), offsets


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
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"module {name!r} is a {type(child).__name__}, which mixes the records of a batch; "
                "replace it by GroupNorm"
            )
