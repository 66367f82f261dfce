"""The ops that other packages import: each checks its arguments, then dispatches."""

from torch import Tensor

from . import reference


def lora_per_record_grads(
    activations: Tensor,
    backprops: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    n_records: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-record gradients of both LoRA factors, and the adapter's input gradient factor.

    activations [N·K, ..., I], backprops [N·K, ..., O], lora_a [R, I], lora_b [O, R] ->
    ``u = scaling · backprops · lora_b`` [N·K·T, R], grad_a [N, R, I], grad_b [N, O, R].
    """
    if activations.shape[:-1] != backprops.shape[:-1]:
        raise ValueError(
            "activations and backprops must agree on all but their last dimension, got "
            f"{tuple(activations.shape)} and {tuple(backprops.shape)}"
        )
    expected = (backprops.shape[-1], lora_a.shape[0])
    if lora_a.shape[1:] != activations.shape[-1:] or lora_b.shape != expected:
        raise ValueError(
            f"lora_a [R, I] and lora_b [O, R] must fit activations [..., I] and backprops "
            f"[..., O], got {tuple(lora_a.shape)} and {tuple(lora_b.shape)} for "
            f"{tuple(activations.shape)} and {tuple(backprops.shape)}"
        )
    if n_records < 1 or len(activations) % n_records:
        raise ValueError(
            f"n_records must be at least 1 and divide the {len(activations)} rows, got {n_records}"
        )
    return reference.lora_per_record_grads(
        activations, backprops, lora_a, lora_b, scaling, n_records
    )


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    """Squared L2 norm of each record's gradient over all tensors.  [N, ...] each -> float64 [N]."""
    _check_records(per_record_grads)
    return reference.sq_norms(per_record_grads)


def clip_factors(sq_norms: Tensor, max_grad_norm: float) -> Tensor:
    """Factors in [0, 1] that bring every norm to at most ``max_grad_norm``.  [N] -> float32 [N].

    1 for a zero norm, 0 for one that is not finite; never rounded upward.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be > 0, got {max_grad_norm}")
    return reference.clip_factors(sq_norms, max_grad_norm)


def weighted_sum(per_record_grads: list[Tensor], weights: Tensor, keep: Tensor) -> list[Tensor]:
    """``Σ_n weights[n] · grad[n]`` over the records where ``keep``, in float64.

    Each tensor [N, ...], weights [N], keep bool [N] -> each [...]. Records that are not kept may
    hold NaN or Inf: they are selected away, not multiplied away.
    """
    _check_records(per_record_grads)
    n_records = len(per_record_grads[0])
    if weights.shape != (n_records,) or keep.shape != (n_records,):
        raise ValueError(
            f"weights and keep must have one entry for each of the {n_records} records, got "
            f"{tuple(weights.shape)} and {tuple(keep.shape)}"
        )
    return reference.weighted_sum(per_record_grads, weights, keep)


def _check_records(per_record_grads: list[Tensor]) -> None:
    if len({len(grad) for grad in per_record_grads}) != 1:
        raise ValueError(
            "per_record_grads must hold at least one tensor, all with the same number of records, "
            f"got {[tuple(grad.shape) for grad in per_record_grads]}"
        )
