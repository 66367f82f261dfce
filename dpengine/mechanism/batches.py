"""What is said of a physical batch, and the per-record gradients that come of it."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from ..errors import PrivacyError
from ..kernels import ops
from .private import Private


@dataclass(frozen=True)
class BatchNotice:
    """What a sampler says of a physical batch: its shape, and its place in the logical batch.

    The first ``n_records`` of ``n_slots`` are records, the others padding. ``is_first``: no sum
    from before may go on with this batch. ``is_last``: noise follows it; None leaves that to the
    optimizer's ``signal_skip_step``. charged: the noise multiplier that its logical batch was
    charged with; None where the optimizer has it from the same plan. logical: an object that the
    batches of one sum share, and no others; None without a sampler. is_public: whether ``n_slots``
    is a public number, as where every batch is padded to one size.
    """

    n_records: Private[int] = field(compare=False, repr=False)
    n_slots: int = field(repr=False)
    is_first: bool = field(repr=False)
    is_last: bool | None = field(repr=False)
    charged: float | None = None
    logical: object = field(default=None, compare=False, repr=False)
    is_public: bool = False


@dataclass(frozen=True)
class PhysicalBatch:
    """One forward pass: the units of ``indices``, then padding up to ``n_slots`` units.

    indices: int64 [n, M], the records of the data that each of the n units brings; private, and
    plain numbers because a loader's workers are sent them. A unit fills one slot, whole; no slot
    holds records of two units. logical, is_public: as in ``BatchNotice``.
    """

    indices: np.ndarray = field(compare=False, repr=False)
    n_slots: int
    is_first: bool
    is_last: bool | None
    logical: object = field(default_factory=object, compare=False, repr=False)
    is_public: bool = False

    def __repr__(self) -> str:
        # Slots and place in the logical batch tell how many units were drawn.
        return "PhysicalBatch(private)"

    @property
    def notice(self) -> BatchNotice:
        """What the capture has to know of this batch; it counts units."""
        n_records = Private(len(self.indices))
        return BatchNotice(
            n_records,
            self.n_slots,
            self.is_first,
            self.is_last,
            logical=self.logical,
            is_public=self.is_public,
        )


def cut(indices: np.ndarray, physical_batch_size: int, pad: bool = True) -> list[PhysicalBatch]:
    """A logical batch as physical batches; at least one, the last one marked.

    indices: int64 [n, M], one unit in each line; a line is never split. pad: whether all have
    ``physical_batch_size`` slots; else the units are shared out evenly, one slot at least.
    """
    starts = range(0, max(len(indices), 1), physical_batch_size)
    pieces = [indices[start : start + physical_batch_size] for start in starts]
    if not pad:
        pieces = np.array_split(indices, len(pieces))
    logical = object()
    return [
        PhysicalBatch(
            piece,
            physical_batch_size if pad else max(len(piece), 1),
            is_first=number == 0,
            is_last=number == len(pieces) - 1,
            logical=logical,
            is_public=pad,
        )
        for number, piece in enumerate(pieces)
    ]


@dataclass(frozen=True, eq=False)
class Product:
    """Gradients ``Σ_t left[n,t]ᵀ right[n,t]`` of a matrix, never held side by side.

    left [N·K, ..., L] (backprops), right [N·K, ..., D] (activations): L·D columns. Their norms and
    their weighted sum take a pass over the factors each, in which a record's product is formed with
    the same bits; where the norm comes from Gram matrices it is an upper bound on that product's.
    """

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    n_records: int = field(repr=False)

    def multiplied(self) -> Tensor:
        """The gradients side by side, for checks.  float32 [N, L, D]"""
        left, right = (
            x.detach().float().reshape(self.n_records, -1, x.shape[-1])
            for x in (self.left, self.right)
        )
        return left.mT @ right

    def sq_norms(self) -> Tensor:
        """float64 [N]"""
        return ops.weight_sq_norms(self.left, self.right, n_records=self.n_records).sum(1)

    def weighted_sum(self, weights: Tensor, keep: Tensor) -> Tensor:
        """``Σ_n weights[n] grad[n]`` over the records kept.  float64 [L·D]"""
        return ops.weighted_product(
            self.left, self.right, weights, keep, n_records=self.n_records
        ).flatten()


Grads = Tensor | Product
"""Gradients of N records: [N, ...], or the factors they are made of."""


class PerRecordGrads(Protocol):
    """The gradients of one physical batch, written by the rules and read by clipping."""

    def view(self, param: Tensor) -> Tensor | None:
        """Where the first gradients of ``param`` are to be written; None: anywhere."""

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        """Keep the factors of the gradients of a matrix instead; False where that is not wanted."""

    def record(self, param: Tensor, grads: Tensor) -> None:
        """Take [N, *param.shape] of the first use of ``param``, or add them to what there is.

        The tensor is the holder's from now on, to add to and to keep.
        """

    def finish(self) -> None:
        """End the batch: zero gradients for each parameter that had no use in it."""

    @property
    def whole(self) -> list[Grads]:
        """All there is as [N, columns] each, or as products."""

    @property
    def by_layer(self) -> list[list[Grads]]:
        """The same in one list for each layer."""

    @property
    def by_param(self) -> list[Tensor]:
        """Views [N, *param.shape] in the order of the parameters."""

    def pack(self, columns: Tensor) -> Tensor:
        """One value for each column, put in the order of the parameters' elements.  [P]"""


@dataclass(frozen=True)
class RecordGrads:
    """Per-record gradients of one physical batch; on a GPU until the next backward pass.

    is_record: bool [N]. n_rows: by how many rows a mean loss was divided, padding included; 1 where
    that is undone already. is_first, is_last: its place in the logical batch, as in
    ``BatchNotice``. n_passes: backward passes that it was gathered from. charged: the noise
    multiplier that it was charged with, if it was. logical: an object that those of one sum share.
    is_coarse: whether they were rounded below float32 where the number of rows is not public.
    """

    grads: PerRecordGrads = field(repr=False)
    is_record: Tensor = field(repr=False)
    n_rows: int = field(repr=False)
    is_first: bool = field(repr=False)
    is_last: bool | None = field(repr=False)
    n_passes: int = 1
    charged: float | None = None
    logical: object = field(default=None, repr=False)
    is_coarse: bool | Tensor = field(default=False, repr=False)

    @property
    def per_record_grads(self) -> list[Tensor]:
        """[N, *param.shape] each, in the order of ``Capture.parameters``."""
        return self.grads.by_param

    def check_charge(self, noise_multiplier: float, charged_only: bool) -> None:
        """Raise PrivacyError unless they were charged with what their sum gets."""
        is_charged = self.charged == noise_multiplier
        if not is_charged and (charged_only or self.charged is not None):
            raise PrivacyError(
                "a batch must be charged with the noise multiplier that its sum gets, and this one "
                "was not; train on the loader that make_private returned, with the optimizer that "
                "it returned, and call make_private for another optimizer or a copy"
            )

    def check_precision(self) -> None:
        """Raise PrivacyError where a mean over a private number of rows has rounded them.

        Such a loss sends ``g / n`` back, whose rounding to 8 or 11 bits depends on n: one record
        more moves the gradients of all others, by up to 2⁻⁸ or 2⁻¹¹ of the bound each.
        """
        if self.is_coarse:
            raise PrivacyError(
                "a mean over a private number of rows is rounded below float32 on its way back, "
                "which moves the gradients of all records: give make_private static_batch=, or sum "
                "the loss and say loss_reduction='sum', or use float32 throughout, the loss too, "
                "with torch.set_float32_matmul_precision('highest') and, on a GPU, "
                "torch.backends.cudnn.allow_tf32 = False"
            )
