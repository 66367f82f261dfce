"""Clipping: the one place where private gradients become a sum of bounded sensitivity.

A mode is a frozen object that holds public numbers alone: ``Flat``, ``PerLayer``, ``Automatic``,
or ``adaptive.Adaptive``. All take the per-record gradients, those of the loss divided by
``loss_scale``, as a list of [N, ...] tensors, columns of one slab or tensors of their own, float32
or bfloat16, and of ``Product``.

The guarantee of each: adding or removing one record moves the sum by at most ``sensitivity`` in L2
norm, in exact arithmetic over the gradients as stored. Padding, and a record whose gradient holds
NaN or Inf in any element of any tensor, contribute exactly 0 and change no bit of the others.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from .errors import positive
from .kernels import ops


@dataclass(frozen=True)
class ClippedSum:
    """Sum over records of clipped gradients, with the bound that makes it private.

    ``values``: float64 [P], all parameters one after another. Adding or removing one record moves
    it by at most ``sensitivity`` in L2 norm. Nothing may rescale it before noise is added.
    """

    values: Tensor
    sensitivity: float

    def __repr__(self) -> str:
        return f"ClippedSum({self.values.numel()} values, sensitivity={self.sensitivity})"


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


def sq_norms(per_record_grads: list[Grads]) -> Tensor:
    """Squared norm of each record's gradient over all of the list.  float64 [N]"""
    tensors = [grads for grads in per_record_grads if isinstance(grads, Tensor)]
    norms = [ops.sq_norms(tensors)] if tensors else []
    norms += [grads.sq_norms() for grads in per_record_grads if isinstance(grads, Product)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)


def empty_sum(n_values: int, sensitivity: float, device: torch.device) -> ClippedSum:
    """The clipped sum of a logical batch without records: float64 zeros, of the same bound."""
    return ClippedSum(torch.zeros(n_values, dtype=torch.float64, device=device), sensitivity)


def join(left: ClippedSum, right: ClippedSum) -> ClippedSum:
    """The clipped sum of two physical batches of one logical batch that share no record.

    Each record is in one of the two, so the sensitivity stays what it was.
    """
    if left.sensitivity != right.sensitivity:
        raise ValueError(
            "both clipped sums must have the same sensitivity, got "
            f"{left.sensitivity} and {right.sensitivity}"
        )
    return ClippedSum(left.values + right.values, left.sensitivity)


@dataclass(frozen=True)
class Flat:
    """``Σ_n min(1, C / ‖g_n‖) g_n`` with the norm taken over all tensors.

    max_grad_norm: C, which is the sensitivity (Abadi et al., arXiv 1607.00133, algorithm 1).
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        positive(max_grad_norm=self.max_grad_norm)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def clip_and_sum(
        self, per_record_grads: list[Grads], is_record: Tensor, *, loss_scale: float = 1.0
    ) -> ClippedSum:
        """per_record_grads: [N, ...] each; is_record: bool [N], False for padding.

        Proof of the guarantee: the norm is that of the stored values, in float64;
        ``reference.clip_factors`` keeps ``factor * norm`` below ``C (1 - 2⁻²³)``, which leaves more
        room than the rounding, 2⁻⁵³ each, of ``loss_scale * factor`` and of its product with an
        element.
        """
        bound = self.max_grad_norm
        values = _clip_and_sum(
            per_record_grads, sq_norms(per_record_grads), is_record, bound, loss_scale
        )
        return ClippedSum(values, self.sensitivity)


@dataclass(frozen=True)
class Automatic:
    """``Σ_n C g_n / (‖g_n‖ + γ)``: every record is brought near the bound, small ones as well.

    max_grad_norm: C, which is the sensitivity; C and the learning rate of SGD are one parameter.
    gamma: γ > 0, in the units of a record's gradient. It keeps small gradients smaller than large
    ones. Source: Bu, Wang, Zha and Karypis, arXiv 2206.07136, AUTO-S, whose γ is 0.01.
    """

    max_grad_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        positive(max_grad_norm=self.max_grad_norm, gamma=self.gamma)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def clip_and_sum(
        self, per_record_grads: list[Grads], is_record: Tensor, *, loss_scale: float = 1.0
    ) -> ClippedSum:
        """per_record_grads: [N, ...] each; is_record: bool [N], False for padding.

        Proof of the guarantee: ``‖g‖ / (‖g‖ + γ) < 1``, and the roundings are those of ``Flat``,
        for which ``reference.clip_factors`` leaves the same room.
        """
        bound, norms = self.max_grad_norm, sq_norms(per_record_grads)
        values = _clip_and_sum(per_record_grads, norms, is_record, bound, loss_scale, self.gamma)
        return ClippedSum(values, self.sensitivity)


@dataclass(frozen=True)
class PerLayer:
    """``Σ_n min(1, C_g / ‖g_n‖) g_n`` in each group g on its own, ``√(Σ_g C_g²) <= C``.

    max_grad_norm: C, which is the sensitivity. Each of the G tensors of ``per_record_grads`` is a
    group, of which only the public number G counts: ``C_g = C / √G``.

    Source: McMahan et al., arXiv 1710.06963, section 3, which splits the bound evenly as well.
    Bounds in proportion to √size would suit elements of equal variance, which those of a network's
    layers are not: with LoRA, A and B of one layer have gradients that differ in scale by more than
    their sizes tell. The even split assumes nothing of the private data.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        positive(max_grad_norm=self.max_grad_norm)

    @property
    def sensitivity(self) -> float:
        return self.max_grad_norm

    def group_bound(self, n_groups: int) -> float:
        """C_g, the largest float64 near ``C / √G`` with ``G C_g² <= C²`` in exact arithmetic."""
        bound = self.max_grad_norm / math.sqrt(n_groups)
        while n_groups * Fraction(bound) ** 2 > Fraction(self.max_grad_norm) ** 2:
            bound = math.nextafter(bound, 0)
        return bound

    def clip_and_sum(
        self,
        per_record_grads: list[Grads | list[Grads]],
        is_record: Tensor,
        *,
        loss_scale: float = 1.0,
    ) -> ClippedSum:
        """per_record_grads: [N, ...] or a list of them for each group; is_record: bool [N].

        Proof of the guarantee: as in ``Flat``, a record adds at most C_g to group g. Groups share
        no element, so the squares of what it adds to each make up the square of what it adds to
        all, at most ``G C_g² <= C²``. A record with a bad element in one group is left out of all.
        """
        groups = [group if isinstance(group, list) else [group] for group in per_record_grads]
        bound = self.group_bound(len(groups))
        norms = [sq_norms(group) for group in groups]
        keep = is_record & (torch.stack(norms).sum(0) < math.inf)
        values = [
            _clip_and_sum(group, norm, keep, bound, loss_scale)
            for group, norm in zip(groups, norms, strict=True)
        ]
        return ClippedSum(torch.cat(values), self.sensitivity)


def _clip_and_sum(
    per_record_grads: list[Grads],
    sq_norms: Tensor,
    keep: Tensor,
    bound: float,
    loss_scale: float,
    gamma: float | None = None,
) -> Tensor:
    """``Σ_n c[n] · loss_scale · grad[n]`` under one bound, column by column.  float64"""
    how = {"max_grad_norm": bound, "loss_scale": loss_scale, "gamma": gamma}
    if not any(isinstance(grads, Product) for grads in per_record_grads):
        return ops.clip_and_sum(per_record_grads, sq_norms, keep, **how)
    scaled = sq_norms * loss_scale**2
    weights = loss_scale * ops.clip_factors(scaled, bound, gamma=gamma)
    finite = keep & (scaled < math.inf)
    return torch.cat(
        [
            grads.weighted_sum(weights, finite)
            if isinstance(grads, Product)
            else ops.clip_and_sum([grads], sq_norms, keep, **how)
            for grads in per_record_grads
        ]
    )
