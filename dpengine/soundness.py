"""What a module must not do while records pass through it.

Some of it can be told from the modules alone, some only when a forward pass has run. That each
record's gradient is its own is checked by running the model on synthetic rows (``selfcheck``).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import PrivacyError

_WRITTEN = (
    "the forward pass wrote into the buffer or tensor {!r}, which would carry private values out "
    "of it without noise, and holds them now: load the module anew, initialise what is taken from "
    "data on public rows, and put what does so (BatchNorm, spectral_norm, a codebook) in eval mode"
)


class Watch:
    """Sees what forward passes of ``module`` leave behind in its tensors and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = [
            (name, owned)
            for name, child in module.named_modules()
            for owned in (child._buffers, child._parameters)
        ]

    def begin(self) -> None:
        """Look before a forward pass."""
        self._before = self._versions()
        self._generators = _generator_state()

    def check(self) -> None:
        """Raise PrivacyError where something was written or replaced, or a random number drawn.

        A write that goes around autograd's versions, as by ``buffer.data.copy_``, shows in
        ``values`` alone.
        """
        versions = self._versions()
        for name in versions.keys() | self._before.keys():
            if self._before.get(name) != versions.get(name):
                raise PrivacyError(_WRITTEN.format(name))
        if self._generators != _generator_state():
            raise PrivacyError(
                "the forward pass drew from torch's generator, which is not secret; draw noise, "
                "timesteps and masks before it, from SecureRandom, and set dropout to 0"
            )

    def values(self) -> dict[str, int]:
        """A checksum of the bits of each tensor and buffer, to see writes of any kind by."""
        return {name: _checksum(tensor) for name, tensor in self._tensors()}

    def check_values(self, before: dict[str, int]) -> None:
        """Raise PrivacyError where a tensor or buffer came, went, or has other bits."""
        after = self.values()
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                raise PrivacyError(_WRITTEN.format(name))

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(tensor), tensor._version) for name, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for owner, owned in self._owners:
            for name, tensor in owned.items():
                if tensor is not None:
                    yield f"{owner}.{name}" if owner else name, tensor


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits, as whole numbers, and of the same weighted by their place."""
    flat = tensor.detach().contiguous().flatten()
    if flat.numel() == 0 or flat.is_quantized or not flat.is_floating_point():
        return hash(bytes(flat.cpu().view(torch.uint8).numpy())) if flat.numel() else 0
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    words = flat.view(kind).long()
    places = torch.arange(1, len(words) + 1, device=words.device)
    return hash((int(words.sum()), int((words * places).sum())))


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
