"""Eager PyTorch specification of every op: the oracle of the kernels and the path on CPU.

Legend: N records, K draws per record, T tokens, R rank, I = in_features, O = out_features.
Rows are ordered ``n * K + k``; all ``K * T`` rows of one record are summed, so averaging over
draws costs a reshape and no gradient per draw is ever formed.
"""

import torch
from torch import Tensor


def lora_per_record_grads(
    activations: Tensor,
    backprops: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    n_records: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-record gradients of both LoRA factors of ``y = x W0ᵀ + s (x Aᵀ) Bᵀ``.

    With ``h = x Aᵀ`` and ``u = s g B``, summed over all K·T rows of record n:

        grad_a[n] = uᵀ x      grad_b[n] = s gᵀ h

    activations ``x`` [N·K, ..., I], backprops ``g`` [N·K, ..., O] of the summed loss,
    lora_a [R, I], lora_b [O, R] -> ``u`` [N·K·T, R], grad_a [N, R, I], grad_b [N, O, R].
    """
    in_features, out_features = activations.shape[-1], backprops.shape[-1]
    x = activations.reshape(n_records, -1, in_features)  # [N, K·T, I]
    g = backprops.reshape(n_records, -1, out_features)  # [N, K·T, O]
    h = x.reshape(-1, in_features) @ lora_a.T  # [N·K·T, R]
    u = scaling * (g.reshape(-1, out_features) @ lora_b)  # [N·K·T, R]
    rank = lora_a.shape[0]
    grad_a = torch.bmm(u.reshape(n_records, -1, rank).mT, x)
    grad_b = scaling * torch.bmm(g.mT, h.reshape(n_records, -1, rank))
    return u, grad_a, grad_b


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    """Squared L2 norm of each record's gradient over all tensors, summed in float64.

    Each tensor [N, ...] -> [N]. A float32 square is exact in float64, so nothing overflows and
    the only rounding is that of the sum: relative error at most P·2⁻⁵³ for P elements.
    """
    total = per_record_grads[0].new_zeros(len(per_record_grads[0]), dtype=torch.float64)
    for grad in per_record_grads:
        total += grad.unsqueeze(-1).flatten(1).double().square().sum(1)
    return total


def clip_factors(sq_norms: Tensor, max_grad_norm: float) -> Tensor:
    """The largest float32 factors at most 1 that keep every contribution within the bound.

    ``(C / norm)(1 - 2⁻²²)``, rounded toward zero to float32; 1 where that exceeds 1 (the norm is
    0 or clearly below C); 0 where the norm is not finite.  float64 [N] -> float32 [N].

    Guarantee: for up to 2²⁹ elements ``sq_norms`` is low by at most one part in 2²⁴, its root by
    2²⁵ with this function's own rounding included, and so ``factor * exact norm`` is below
    ``C (1 - 2⁻²²) / (1 - 2⁻²⁴) < C (1 - 2⁻²³)``. A factor of 1 is given only where
    ``norm <= C (1 - 2⁻²²)``, to which the same inequality applies.
    """
    limit = max_grad_norm * (1 - 2.0**-22)
    wanted = (limit / sq_norms.sqrt()).clamp(max=1.0)
    rounded = wanted.float()
    too_large = rounded.double() > wanted
    factors = torch.where(too_large, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    return torch.where(sq_norms.isfinite(), factors, torch.zeros_like(factors))


def weighted_sum(per_record_grads: list[Tensor], weights: Tensor, keep: Tensor) -> list[Tensor]:
    """``Σ_n weights[n] · grad[n]`` over the kept records, in float64.

    Each tensor [N, ...], weights [N], keep bool [N] -> each [...]. Records that are not kept are
    removed by selection, because ``0 * inf`` is NaN. Every record's product is exact when the
    weight is a float32 value; the sum runs over all N slots whatever is kept, so that a removed
    record leaves the order of summation, and with it every bit of the others, as it was.
    """
    weights = weights.double()
    sums = []
    for grad in per_record_grads:
        rows = torch.where(keep[:, None], grad.unsqueeze(-1).flatten(1).double(), 0.0)
        sums.append((weights @ rows).reshape(grad.shape[1:]))
    return sums
