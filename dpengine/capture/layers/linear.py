"""The per-record rule of a linear layer's own weight and bias."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .rule import SlotSet, as_written, compute_dtype


class LinearFunction(torch.autograd.Function):
    """``y = x Wᵀ + b`` with ``grad_W[n] = Σ_t g[n,t]ᵀ x[n,t]`` and ``grad_b[n] = Σ_t g[n,t]``.

    x [rows, I] -> [rows, O], T rows for each of N·K.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot_set: SlotSet
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.slot_set, ctx.x_dtype = weight, bias, slot_set, x.dtype
        dtype = compute_dtype(x)
        with as_written(x):
            x = x.to(dtype)
            ctx.save_for_backward(x if weight.requires_grad else None)
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        slot_set, weight, bias = ctx.slot_set, ctx.weight, ctx.bias
        slot_set.on_backward()
        (x,) = ctx.saved_tensors
        how = {"n_records": slot_set.n_slots, "impl": slot_set.impl}
        with as_written(backprops):
            if weight.requires_grad and not slot_set.postpone(weight, backprops, x):
                out = slot_set.view(weight)
                slot_set.record(weight, ops.per_record_product(backprops, x, out=out, **how))
            if bias is not None and bias.requires_grad:
                out = slot_set.view(bias)
                slot_set.record(bias, ops.bias_per_record_grads(backprops, out=out, **how))
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (backprops @ weight.to(backprops.dtype)).to(ctx.x_dtype)
        return dx, None, None, None


def forward(layer: nn.Linear, slot_set: SlotSet, x: Tensor) -> Tensor:
    """The layer's forward pass, the gradients of its parameters kept apart by record."""
    rows = x.reshape(-1, x.shape[-1])
    output = LinearFunction.apply(rows, layer.weight, layer.bias, slot_set)
    return output.view(*x.shape[:-1], -1)
