"""What forward passes of a module leave behind in it, seen from outside."""

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import PrivacyError

_HELD: "WeakKeyDictionary[nn.Module, dict[str, Any]]" = WeakKeyDictionary()
"""Names of what a private pass wrote into a module, and a checksum of what they held then."""


class Watch:
    """Sees what forward passes of ``module`` write into what its `state_dict` gives away.

    These are its parameters, its buffers, and the extra state of modules that define one. What was
    written stays refused: by this watch, and by each made later as long as ``module`` holds it.

    Raises PrivacyError where ``module`` holds what a pass wrote under an earlier watch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(f"{n}." if n else "", child) for n, child in module.named_modules()]
        self._owned = [
            (prefix, owned)
            for prefix, child in self._modules
            for owned in (child._buffers, child._parameters)
        ]
        self._with_extra_state = [
            (f"{prefix}_extra_state", child)
            for prefix, child in self._modules
            if type(child).get_extra_state is not nn.Module.get_extra_state
        ]
        self._before: dict[str, Any] | None = None
        self._looked_at: dict[str, tuple[Any, Any]] = {}
        self._written = self._held()
        self._refuse_written()

    def begin(self) -> None:
        """Look before a forward pass. Raises PrivacyError where an earlier one wrote something."""
        self._check_unfinished()
        self._before = self._marks()
        self._generators = _generator_state()

    def check(self) -> None:
        """Raise PrivacyError where something was written or replaced, or a random number drawn.

        A write that moves no version of a tensor, as by ``buffer.data.copy_``, shows in
        ``check_bits`` alone.
        """
        before, self._before = self._before or {}, None
        self._note(_changed(before, self._marks()))
        self._refuse_written()
        if self._generators != _generator_state():
            raise PrivacyError(
                "the forward pass drew from torch's generator, which is not secret; draw noise, "
                "timesteps and masks before it, from SecureRandom, and set dropout to 0"
            )

    def check_bits(self, *, undisturbed: bool) -> None:
        """Raise PrivacyError where a tensor has other bits than at the last call.

        undisturbed: nothing but forward passes was at work since then, so any change tells.
        Otherwise a change tells in what is frozen, where neither version nor place moved. Reads
        the whole module, which takes about as long as a copy of it.
        """
        before, after = self._looked_at, self._marks_and_bits()
        if undisturbed:
            bits = [{name: bits for name, (_, bits) in seen.items()} for seen in (before, after)]
            self._note(_changed(*bits))
        else:
            trained = self._trained()
            both = [name for name in before if name in after and name not in trained]
            unmoved = [name for name in both if before[name][0] == after[name][0]]
            self._note(name for name in unmoved if before[name][1] != after[name][1])
        self._looked_at = after
        self._refuse_written()

    def check_leaving(self) -> None:
        """Raise PrivacyError where a `state_dict` taken now would hold what a pass wrote."""
        self._check_unfinished()
        if self._looked_at:
            self.check_bits(undisturbed=False)

    def _check_unfinished(self) -> None:
        """Refuse what an earlier pass wrote, one that failed on its way too.

        Trained tensors may have been updated since a pass that failed.
        """
        if self._before is not None:
            before, self._before = self._before, None
            self._note(set(_changed(before, self._marks())) - self._trained())
        self._refuse_written()

    def _refuse_written(self) -> None:
        if self._written is not None:
            raise PrivacyError(
                f"the forward pass wrote into {self._written!r}, a tensor or state of the module, "
                "which would carry private values out of it without noise, and holds them now: "
                "load the module anew, initialise what is taken from data on public rows, and put "
                "what does so (BatchNorm, spectral_norm, a codebook) in eval mode"
            )

    def _note(self, names: Iterable[str]) -> None:
        names = sorted(names)
        if not names:
            return
        self._written = self._written or names[0]
        now = self._marks_and_bits()
        for prefix, child in self._modules:
            under = [n.removeprefix(prefix) for n in names if n in now and n.startswith(prefix)]
            own = {name: now[prefix + name][1] for name in under if "." not in name}
            if own:
                _HELD.setdefault(child, {}).update(own)

    def _held(self) -> str | None:
        """What holds now what a pass wrote under an earlier watch."""
        if not any(child in _HELD for _, child in self._modules):
            return None
        now = self._marks_and_bits()
        for prefix, child in self._modules:
            for name, bits in _HELD.get(child, {}).items():
                if prefix + name in now and now[prefix + name][1] == bits:
                    return prefix + name
        return None

    def _marks(self) -> dict[str, Any]:
        """What moves with each write that autograd sees, and with each replacement."""
        marks: dict[str, Any] = {name: _mark(tensor) for name, tensor in self._tensors()}
        for name, child in self._with_extra_state:
            marks[name] = _bits(child.get_extra_state())
        return marks

    def _marks_and_bits(self) -> dict[str, tuple[Any, Any]]:
        seen = {name: (_mark(tensor), _checksum(tensor)) for name, tensor in self._tensors()}
        for name, child in self._with_extra_state:
            seen[name] = None, _bits(child.get_extra_state())
        return seen

    def _trained(self) -> set[str]:
        return {name for name, tensor in self._tensors() if tensor.requires_grad}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, owned in self._owned:
            for name, tensor in owned.items():
                if tensor is not None:
                    yield prefix + name, tensor


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype


def _bits(state: object) -> str:
    """An extra state as text, in which tensors and arrays are told apart by their bits."""

    def bits(leaf: object) -> object:
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        return _checksum(leaf) if isinstance(leaf, Tensor) else leaf

    return repr(tree_map(bits, state))


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
