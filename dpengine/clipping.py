"""Clipping: the one place where private gradients become a sum of bounded sensitivity."""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def empty_sum(n_values: int, max_grad_norm: float, device: torch.device) -> ClippedSum:
    """The clipped sum of a logical batch without records: float64 zeros, of the same bound."""
    return ClippedSum(torch.zeros(n_values, dtype=torch.float64, device=device), max_grad_norm)


def clip_and_sum(
    per_record_grads: list[Tensor],
    is_record: Tensor,
    max_grad_norm: float,
    *,
    loss_scale: float = 1.0,
) -> ClippedSum:
    """Flat clipping: ``Σ_n min(1, C / ‖g_n‖) g_n`` with the norm taken over all tensors.

    per_record_grads: one [N, ...] tensor for each parameter, the gradients of the loss divided by
    ``loss_scale``; is_record: bool [N], False for padding. The sum is float64.

    Guarantee: every record contributes at most C = ``max_grad_norm`` in L2 norm, in exact
    arithmetic over the gradients as stored. Padding, and a record whose gradient holds NaN or Inf
    in any element, contribute exactly 0 and change no bit of the others. Proof: the norm is that
    of the stored values, in float64; ``reference.clip_factors`` keeps ``factor * norm`` below
    ``C (1 - 2⁻²³)``, which leaves more room than the rounding, 2⁻⁵³ each, of
    ``loss_scale * factor`` and of its product with an element.
    """
    values = ops.clip_and_sum(
        per_record_grads,
        ops.sq_norms(per_record_grads),
        is_record,
        max_grad_norm=max_grad_norm,
        loss_scale=loss_scale,
    )
    return ClippedSum(values, max_grad_norm)


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
