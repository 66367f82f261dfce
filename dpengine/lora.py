"""The per-record rule of LoRA on a linear layer: an autograd Function that owns the layer.

For ``y = x W0ᵀ + b + s (x Aᵀ) Bᵀ`` the backward pass returns the per-record gradients of A and B
to their slots and the ordinary gradient to x. No ordinary weight gradient is ever formed.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from .kernels import ops


class SlotSet(Protocol):
    """What a layer needs of the slot set that its forward pass belongs to."""

    n_slots: int

    def slot(self, param: Tensor) -> Tensor | None:
        """The slot [n_slots, *param.shape] of a trainable tensor, None for a frozen one."""

    def on_backward(self) -> None:
        """Called at the start of each backward pass through a layer; may refuse it."""


class LoraLinearFunction(torch.autograd.Function):
    """Linear layer with a LoRA adapter and one gradient slot for each factor.

    x [N·K, ..., I] -> [N·K, ..., O]; slots [N, R, I] and [N, O, R], None for a frozen factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        slot_a: Tensor | None,
        slot_b: Tensor | None,
        scaling: float,
        slot_set: SlotSet,
    ) -> Tensor:
        output = F.linear(x, weight, bias)
        h = ops.lora_forward(output, x, lora_a, lora_b, scaling=scaling)
        ctx.save_for_backward(x, h, weight, lora_a, lora_b)
        ctx.scaling, ctx.slot_set = scaling, slot_set
        return output

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        ctx.slot_set.on_backward()
        x, h, weight, lora_a, lora_b = ctx.saved_tensors
        n_slots = ctx.slot_set.n_slots
        u, grad_b, _ = ops.lora_side_b(backprops, h, lora_b, scaling=ctx.scaling, n_records=n_slots)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (backprops.reshape(-1, weight.shape[0]) @ weight).view(x.shape)
        grad_a, _ = ops.lora_side_a(x, u, lora_a, n_records=n_slots, input_grad=dx)
        # A frozen factor has no slot to receive a gradient. The norms that come with the gradients
        # are not used: hooks and casts of autograd lie between here and the slots.
        grad_a = grad_a if ctx.needs_input_grad[5] else None
        grad_b = grad_b if ctx.needs_input_grad[6] else None
        return dx, None, None, None, None, grad_a, grad_b, None, None


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise TypeError or ValueError unless the rule covers ``layer`` as it is configured."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        raise TypeError(
            f"layer {name!r} is a {type(layer).__name__} over a "
            f"{type(getattr(layer, 'base_layer', None)).__name__}; only PEFT LoRA on nn.Linear "
            "has a per-record rule: remove it from target_modules"
        )
    if layer.lora_variant:
        raise ValueError(
            f"layer {name!r} uses the LoRA variant {list(layer.lora_variant.values())}; only plain "
            "LoRA has a per-record rule: set use_dora and the like to False"
        )
    if any(factor.bias is not None for factor in layer.lora_B.values()):
        raise ValueError(
            f"layer {name!r} has a LoRA bias, which has no per-record rule: set lora_bias=False"
        )
    for dropout in layer.lora_dropout.values():
        if getattr(dropout, "p", 0) > 0:
            raise ValueError(
                f"layer {name!r} has lora_dropout {dropout.p}; dropout is not supported while "
                "per-record gradients are taken: set lora_dropout=0"
            )


def trainable_adapter(name: str, layer: LoraLinear) -> str | None:
    """The one adapter that runs in ``layer``, or None where it is disabled or frozen.

    Raises ValueError where none or several are active, or where one is merged into the base.
    """
    if layer.disable_adapters:
        return None
    if layer.merged:
        raise ValueError(f"layer {name!r} has a merged adapter; call unmerge() before training")
    if len(layer.active_adapters) != 1:
        raise ValueError(
            f"layer {name!r} must have exactly one active adapter, got {layer.active_adapters}; "
            "call set_adapter with one name"
        )
    adapter = layer.active_adapters[0]
    factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return adapter if any(factor.requires_grad for factor in factors) else None


def forward(
    layer: LoraLinear,
    adapter: str,
    x: Tensor,
    slot_set: SlotSet,
) -> Tensor:
    """PEFT's forward of ``layer``, its per-record gradients sent to the slots of its factors."""
    lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    base = layer.base_layer
    dtypes = {x.dtype, base.weight.dtype, lora_a.dtype, lora_b.dtype}
    if torch.is_autocast_enabled(x.device.type) or dtypes != {torch.float32}:
        raise TypeError(
            f"a LoRA layer got {x.dtype} input, a {base.weight.dtype} base and a {lora_a.dtype} "
            "adapter; per-record gradients are taken in float32 only: leave autocast off and load "
            "the base and the adapter in float32"
        )
    return LoraLinearFunction.apply(
        x,
        base.weight,
        base.bias,
        lora_a,
        lora_b,
        slot_set.slot(lora_a),
        slot_set.slot(lora_b),
        layer.scaling[adapter],
        slot_set,
    )
