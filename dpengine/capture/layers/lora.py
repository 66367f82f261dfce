"""The per-record rule of LoRA on linear layers and convolutions, over a frozen base.

For ``y = x W0ᵀ + b + s (x Aᵀ) Bᵀ`` the backward pass forms ``u = s g B``, the per-record gradients
``grad_A[n] = Σ_t u[n,t]ᵀ x[n,t]`` and ``grad_B[n] = s Σ_t g[n,t]ᵀ h[n,t]`` with ``h = x Aᵀ``, and
``dx = g W0 + u A``. GPT-2's ``Conv1D`` is a linear layer that keeps W0ᵀ. The adapter runs in the
type of the base (or autocast's), products summed in float32; the factors themselves are float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1D as TransposedLinear
from peft.tuners.lora.layer import Conv1d as LoraConv1d
from torch import Tensor, nn

from ...kernels import ops
from .conv import Geometry
from .rule import SlotSet, as_written, compute_dtype

_BASES = {
    LoraLinear: (nn.Linear, TransposedLinear),
    LoraConv1d: (nn.Conv1d,),
    LoraConv2d: (nn.Conv2d,),
}


class LoraLinearFunction(torch.autograd.Function):
    """Linear layer with a LoRA adapter: x [rows, I] -> [rows, O], T rows for each of N·K."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        slot_set: SlotSet,
    ) -> Tensor:
        ctx.weight, ctx.lora_a, ctx.lora_b = weight, lora_a, lora_b
        ctx.scaling, ctx.slot_set, ctx.x_dtype = scaling, slot_set, x.dtype
        dtype = compute_dtype(x)
        with as_written(x):
            x = x.to(dtype)
            output = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            h = ops.lora_forward(output, x, lora_a, lora_b, scaling=scaling, impl=slot_set.impl)
        ctx.save_for_backward(x, h)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        slot_set, lora_a, lora_b = ctx.slot_set, ctx.lora_a, ctx.lora_b
        slot_set.on_backward()
        x, h = ctx.saved_tensors
        how = {"n_records": slot_set.n_slots, "impl": slot_set.impl}
        with as_written(backprops):
            u, grads = ops.lora_side_b(
                backprops, h, lora_b, scaling=ctx.scaling, out=slot_set.view(lora_b), **how
            )
            slot_set.record(lora_b, grads)
            dx = None
            if ctx.needs_input_grad[0]:
                weight = ctx.weight.to(backprops.dtype)
                dx = backprops @ weight
            if dx is not None or lora_a.requires_grad:
                out = slot_set.view(lora_a)
                grads = ops.lora_side_a(x, u, lora_a, input_grad=dx, out=out, **how)
                slot_set.record(lora_a, grads)
        return None if dx is None else dx.to(ctx.x_dtype), *(None,) * 6


class LoraConvFunction(torch.autograd.Function):
    """Convolution with a LoRA adapter: x [N·K, C, ...] -> [N·K, O, ...].

    A has the base's kernel, stride and padding; B is a convolution of size 1, a linear layer over
    the pixels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Conv1d | nn.Conv2d,
        lora_a: Tensor,
        lora_b: Tensor,
        geometry: Geometry,
        scaling: float,
        slot_set: SlotSet,
    ) -> Tensor:
        ctx.base, ctx.lora_a, ctx.lora_b, ctx.geometry = base, lora_a, lora_b, geometry
        ctx.scaling, ctx.slot_set, ctx.x_dtype = scaling, slot_set, x.dtype
        dtype = compute_dtype(x)
        with as_written(x):
            x = x.to(dtype)
            bias = None if base.bias is None else base.bias.to(dtype)
            output = Geometry.of(base).convolve(x, base.weight.to(dtype), bias)
            h = geometry.convolve(x, lora_a.to(dtype))
            conv = F.conv2d if len(geometry.stride) == 2 else F.conv1d
            output.add_(conv(h, lora_b.to(dtype)), alpha=scaling)
        ctx.save_for_backward(x, h)
        return output

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        slot_set, lora_a, lora_b = ctx.slot_set, ctx.lora_a, ctx.lora_b
        slot_set.on_backward()
        x, h = ctx.saved_tensors
        how = {"n_records": slot_set.n_slots, "impl": slot_set.impl}
        with as_written(backprops):
            out = slot_set.view(lora_b)
            u, grads = ops.lora_side_b(
                backprops.movedim(1, -1),
                h.movedim(1, -1),
                lora_b.flatten(1),
                scaling=ctx.scaling,
                out=None if out is None else out.flatten(2),
                **how,
            )
            slot_set.record(lora_b, grads.view(-1, *lora_b.shape))
            u = u.movedim(-1, 1)
            if lora_a.requires_grad:
                out, kernel_size = slot_set.view(lora_a), lora_a.shape[2:]
                grads = ctx.geometry.weight_grads(x, u, kernel_size, out, slot_set)
                slot_set.record(lora_a, grads)
            dx = None
            if ctx.needs_input_grad[0]:
                weight = ctx.base.weight.to(x.dtype)
                dx = Geometry.of(ctx.base).input_grad(backprops, x, weight)
                dx += ctx.geometry.input_grad(u, x, lora_a.to(x.dtype))
                dx = dx.to(ctx.x_dtype)
        return dx, *(None,) * 6


def check(name: str, layer: nn.Module) -> None:
    """Raise TypeError or ValueError unless the rule covers ``layer`` as it is configured."""
    base = getattr(layer, "base_layer", None)
    if type(base) not in _BASES.get(type(layer), ()):
        kind = type(layer)
        raise TypeError(
            f"layer {name!r} is a {kind.__module__}.{kind.__name__} over a {type(base).__name__}; "
            "of PEFT's layers, LoRA on nn.Linear, nn.Conv1d, nn.Conv2d and GPT-2's Conv1D has a "
            "per-record rule: use LoraConfig, and remove other layers from target_modules"
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
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        plain = isinstance(base.padding, tuple) and base.padding_mode == "zeros"
        if not plain or base.groups != 1:
            raise ValueError(
                f"layer {name!r} is LoRA over a convolution with padding {base.padding!r}, "
                f"padding mode {base.padding_mode!r} and {base.groups} groups; the per-record rule "
                "is for numeric zero padding and one group: remove it from target_modules"
            )
    for param_name, param in base.named_parameters():
        if param.requires_grad:
            raise ValueError(
                f"layer {name!r} trains its base {param_name} beside its adapter; train the one or "
                "the other: freeze it with requires_grad_(False), or leave the layer out of "
                "target_modules"
            )


def trainable_adapter(name: str, layer: LoraLayer) -> str | None:
    """The one adapter that runs in ``layer``, or None where it is disabled, frozen or elsewhere.

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
    if adapter not in layer.lora_A:
        return None
    factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return adapter if any(factor.requires_grad for factor in factors) else None


def forward(layer: LoraLayer, adapter: str, slot_set: SlotSet, x: Tensor) -> Tensor:
    """PEFT's forward of ``layer``, the gradients of its factors kept apart by record."""
    base, factor = layer.base_layer, layer.lora_A[adapter]
    lora_a, lora_b = factor.weight, layer.lora_B[adapter].weight
    scaling = layer.scaling[adapter]
    if not torch.is_autocast_enabled(x.device.type) and x.dtype != base.weight.dtype:
        raise TypeError(
            f"a LoRA layer got {x.dtype} input for a {base.weight.dtype} base; cast the one to the "
            "other, or run under torch.autocast"
        )
    if isinstance(base, nn.Linear | TransposedLinear):
        rows = x.reshape(-1, x.shape[-1])
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
        output = LoraLinearFunction.apply(
            rows, weight, base.bias, lora_a, lora_b, scaling, slot_set
        )
        return output.view(*x.shape[:-1], -1)
    geometry = Geometry.of(factor)
    return LoraConvFunction.apply(x, base, lora_a, lora_b, geometry, scaling, slot_set)
