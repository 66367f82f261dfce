"""The per-record rule of the scale and shift of GroupNorm, LayerNorm and RMSNorm.

The normalisation itself has no parameter and runs as it is, under ordinary autograd.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .rule import SlotSet, as_written


class AffineFunction(torch.autograd.Function):
    """``y = x̂ w + b`` with ``grad_w[n] = Σ_t g[n,t] x̂[n,t]`` and ``grad_b[n] = Σ_t g[n,t]``.

    normalized x̂ [N·K, ..., C], weight and bias [C] or None -> like x̂.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normalized: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        params: tuple[Tensor | None, Tensor | None],
        slot_set: SlotSet,
    ) -> Tensor:
        ctx.params, ctx.slot_set = params, slot_set
        needs_input = weight is not None and weight.requires_grad
        ctx.save_for_backward(normalized if needs_input else None, weight)
        output = normalized if weight is None else normalized * weight
        return (output if bias is None else output + bias).to(normalized.dtype)

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        slot_set = ctx.slot_set
        slot_set.on_backward()
        normalized, scale = ctx.saved_tensors
        weight, bias = ctx.params
        how = {"n_records": slot_set.n_slots, "impl": slot_set.impl}
        with as_written(backprops):
            if weight is not None and weight.requires_grad:
                out = _flat(slot_set.view(weight))
                grads = ops.scale_per_record_grads(backprops, normalized, out=out, **how)
                slot_set.record(weight, grads.view(-1, *weight.shape))
            if bias is not None and bias.requires_grad:
                out = _flat(slot_set.view(bias))
                grads = ops.bias_per_record_grads(backprops, out=out, **how)
                slot_set.record(bias, grads.view(-1, *bias.shape))
            if not ctx.needs_input_grad[0]:
                return None, None, None, None, None
            dx = backprops if scale is None else (backprops * scale).to(backprops.dtype)
        return dx, None, None, None, None


def group_norm(layer: nn.GroupNorm, slot_set: SlotSet, x: Tensor) -> Tensor:
    """GroupNorm [N·K, C, ...], the gradients of its parameters kept apart by record."""
    normalized = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    return _affine(layer.weight, layer.bias, normalized.movedim(1, -1), slot_set).movedim(-1, 1)


def layer_norm(layer: nn.LayerNorm, slot_set: SlotSet, x: Tensor) -> Tensor:
    """LayerNorm, the gradients of its parameters kept apart by record."""
    normalized = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    flat = normalized.flatten(-len(layer.normalized_shape))
    return _affine(layer.weight, layer.bias, flat, slot_set).view_as(normalized)


def rms_norm(layer: nn.RMSNorm, slot_set: SlotSet, x: Tensor) -> Tensor:
    """RMSNorm, the gradients of its weight kept apart by record."""
    normalized = F.rms_norm(x, layer.normalized_shape, None, layer.eps)
    flat = normalized.flatten(-len(layer.normalized_shape))
    return _affine(layer.weight, None, flat, slot_set).view_as(normalized)


def _affine(
    weight: Tensor | None, bias: Tensor | None, normalized: Tensor, slot_set: SlotSet
) -> Tensor:
    columns = [None if param is None else param.flatten() for param in (weight, bias)]
    return AffineFunction.apply(normalized, *columns, (weight, bias), slot_set)


def _flat(view: Tensor | None) -> Tensor | None:
    return None if view is None else view.flatten(1)
