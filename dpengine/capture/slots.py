"""Where the per-record gradients of one physical batch are kept until they are clipped.

On a GPU in a slab: one tensor [N, width], made once, that the kernels write into and that one
launch clips. On a CPU in a tensor of its own for each parameter: products written into rows of a
slab are several times slower there, and no launch is saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import PrivacyError
from ..mechanism.batches import BatchNotice, Grads, PerRecordGrads, Product

_ALIGNMENT = 64
"""Bytes. Each parameter's columns begin at such an address in every row of a slab."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The parameters in order, and the number of the layer that each belongs to.

    Parameters of one layer are neighbours: per-layer clipping clips them together.
    """

    params: tuple[Tensor, ...]
    layers: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def starts(self) -> list[int]:
        """The first column of each parameter in a slab, and the width of the slab at the end."""
        step = _ALIGNMENT // self.dtype.itemsize
        starts = [0]
        for param in self.params:
            starts.append(starts[-1] + -(-param.numel() // step) * step)
        return starts

    @cached_property
    def groups(self) -> list[slice]:
        """For each layer, which of the parameters are its own."""
        borders = [i for i in range(1, len(self.layers)) if self.layers[i] != self.layers[i - 1]]
        edges = [0, *borders, len(self.layers)]
        return [slice(*edge) for edge in pairwise(edges)]


class Slab:
    """One tensor [N, width]; between the parameters lie columns of zeros."""

    def __init__(self, layout: Layout, n_slots: int) -> None:
        self._layout = layout
        device = layout.params[0].device
        self.values = torch.zeros(n_slots, layout.starts[-1], dtype=layout.dtype, device=device)
        self._views = {
            param: self.values[:, start : start + param.numel()].view(n_slots, *param.shape)
            for start, param in zip(layout.starts, layout.params, strict=False)
        }
        self._written: set[Tensor] = set()

    def begin(self) -> None:
        """Begin another batch: what is in the slab will be written over."""
        self._written.clear()

    def view(self, param: Tensor) -> Tensor | None:
        return None if param in self._written else self._views.get(param)

    def record(self, param: Tensor, grads: Tensor) -> None:
        view = self._views.get(param)
        if view is None:
            _check_frozen(param)
            return
        if param in self._written:
            view.add_(grads)
        elif grads.data_ptr() != view.data_ptr():
            view.copy_(grads)
        self._written.add(param)

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        return False

    def finish(self) -> None:
        for param, view in self._views.items():
            if param not in self._written:
                view.zero_()

    @property
    def whole(self) -> list[Grads]:
        return [self.values]

    @property
    def by_layer(self) -> list[list[Grads]]:
        starts = self._layout.starts
        return [[self.values[:, starts[g.start] : starts[g.stop]]] for g in self._layout.groups]

    @property
    def by_param(self) -> list[Tensor]:
        return list(self._views.values())

    def pack(self, columns: Tensor) -> Tensor:
        starts, params = self._layout.starts, self._layout.params
        if starts[-1] == sum(param.numel() for param in params):
            return columns
        pieces = zip(starts, params, strict=False)
        return torch.cat([columns[start : start + param.numel()] for start, param in pieces])


class SeparateGrads:
    """A tensor for each parameter, as its rule has made it: perhaps with two axes exchanged."""

    def __init__(self, layout: Layout, n_slots: int, norm_only: bool = False) -> None:
        self._layout, self._n_slots, self._norm_only = layout, n_slots, norm_only
        self._grads: dict[Tensor, Tensor | Product] = {}
        self._known = set(layout.params)

    def view(self, param: Tensor) -> None:
        return None

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        if not self._norm_only:
            return False
        if param in self._grads:
            raise ValueError(
                f"a linear layer with a weight of shape {tuple(param.shape)} is used twice in one "
                "forward pass; the norm of the sum of both gradients needs the gradients: leave "
                "norm_only, or grad_sample_mode='ghost', out"
            )
        self._grads[param] = Product(backprops, activations, self._n_slots)
        return True

    def record(self, param: Tensor, grads: Tensor) -> None:
        if param not in self._known:
            _check_frozen(param)
            return
        before = self._grads.get(param)
        if before is None:
            self._grads[param] = grads.to(self._layout.dtype)
        elif isinstance(before, Product):
            raise ValueError(
                f"a weight of shape {tuple(param.shape)} is used by two layers; the norm of the "
                "sum of both gradients needs the gradients: leave norm_only, or "
                "grad_sample_mode='ghost', out"
            )
        else:
            before.add_(grads)

    def finish(self) -> None:
        for param in self._layout.params:
            if param not in self._grads:
                shape = self._n_slots, *param.shape
                self._grads[param] = param.new_zeros(shape, dtype=self._layout.dtype)

    @property
    def whole(self) -> list[Grads]:
        return [
            (grads.mT if turned else grads).unsqueeze(-1).flatten(1)
            if isinstance(grads, Tensor)
            else grads
            for grads, turned in zip(self._in_order, self._turned, strict=True)
        ]

    @property
    def by_layer(self) -> list[list[Grads]]:
        whole = self.whole
        return [whole[group] for group in self._layout.groups]

    @property
    def by_param(self) -> list[Tensor]:
        return [g.multiplied() if isinstance(g, Product) else g for g in self._in_order]

    @property
    def _in_order(self) -> list[Tensor | Product]:
        return [self._grads[param] for param in self._layout.params]

    @property
    def _turned(self) -> tuple[bool, ...]:
        """Which of the matrices lie in memory with rows and columns exchanged."""
        return tuple(
            isinstance(g, Tensor) and g.ndim == 3 and g.stride(1) < g.stride(2)
            for g in self._in_order
        )

    def pack(self, columns: Tensor) -> Tensor:
        turned = self._turned
        if not any(turned):
            return columns
        shapes = tuple(param.shape for param in self._layout.params)
        return columns[_order(shapes, turned).to(columns.device)]


@dataclass
class BatchSlots:
    """The slots of one forward and backward pass; the layers' Functions hold on to it."""

    n_rows: int = field(repr=False)
    notice: BatchNotice = field(repr=False)
    grads: PerRecordGrads | None = field(repr=False)
    impl: str
    state: str = "open"  # then "backward", then "closed"
    is_coarse: bool | Tensor = field(default=False, repr=False)  # something below float32 took part

    @property
    def n_slots(self) -> int:
        return self.notice.n_slots

    def note_rounding(self, is_coarse: bool | Tensor) -> None:
        """Take in whether something was rounded below float32; on a GPU a tensor not awaited."""
        self.is_coarse = self.is_coarse | is_coarse

    def view(self, param: Tensor) -> Tensor | None:
        return self.grads.view(param)

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        return self.grads.postpone(param, backprops, activations)

    def record(self, param: Tensor, grads: Tensor) -> None:
        self.grads.record(param, grads)

    def on_backward(self) -> None:
        if torch.is_grad_enabled():
            raise PrivacyError(
                "backward(create_graph=True) and gradient penalties have no per-record rule: leave "
                "them out"
            )
        if self.state == "closed":
            raise PrivacyError(
                "backward ran twice through one forward pass, or through one whose batch was given "
                "up; its records would count twice: sum the losses and call backward once"
            )
        if self.state == "open":
            self.state = "backward"
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def on_replay(self, params: tuple[Tensor, ...], grads: list[Tensor]) -> None:
        """A recorded pass has computed the gradients of ``params``."""
        for param, grad in zip(params, grads, strict=True):
            self.grads.record(param, grad)
        self._close()

    def _close(self) -> None:
        self.grads.finish()
        self.state = "closed"


def _check_frozen(param: Tensor) -> None:
    if param.requires_grad:
        raise PrivacyError(
            f"a tensor of shape {tuple(param.shape)} is trained that was not when the module was "
            "captured; call the capture's detach() and capture the module again"
        )


@lru_cache(maxsize=8)
def _order(shapes: Sequence[torch.Size], turned: Sequence[bool]) -> Tensor:
    """For each element of the parameters, its place among the columns.  int64 [P]"""
    pieces, start = [], 0
    for shape, is_turned in zip(shapes, turned, strict=True):
        places = torch.arange(start, start + shape.numel())
        if is_turned:
            places = places.view(shape[1], shape[0]).T.flatten()
        pieces.append(places)
        start += shape.numel()
    return torch.cat(pieces)
