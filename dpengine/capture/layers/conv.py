"""The per-record rule of a convolution's own weight and bias, 1-D and 2-D."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .rule import SlotSet, as_written, compute_dtype


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation of a convolution over one or two axes, and its groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> "Geometry":
        return cls(layer.stride, layer.padding, layer.dilation, layer.groups)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [N·K, C, ...], weight [O, C / groups, ...] -> [N·K, O, ...]."""
        conv = F.conv2d if len(self.stride) == 2 else F.conv1d
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_grad(self, backprops: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of ``convolve``'s x, and of nothing else."""
        return torch.ops.aten.convolution_backward(
            backprops,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [True, False, False],
        )[0]

    def weight_grads(
        self,
        x: Tensor,
        backprops: Tensor,
        kernel_size: tuple[int, ...],
        out: Tensor | None,
        slot_set: SlotSet,
    ) -> Tensor:
        """``grad[n, o, c, k] = Σ_p g[n, o, p] x[n, c, p·stride - padding + k·dilation]``.

        For groups = 1. A 1-D convolution is a 2-D one of height 1.  -> [N, O, C, *kernel_size]
        """
        flat = len(self.stride) == 1
        if flat:
            x, backprops = x.unsqueeze(2), backprops.unsqueeze(2)
            out = None if out is None else out.unsqueeze(3)
        grads = ops.lora_conv_side_a(
            x,
            backprops,
            kernel_size=(1,) * flat + tuple(kernel_size),
            stride=(1,) * flat + self.stride,
            padding=(0,) * flat + self.padding,
            dilation=(1,) * flat + self.dilation,
            n_records=slot_set.n_slots,
            out=out,
            impl=slot_set.impl,
        )
        return grads.squeeze(3) if flat else grads


class ConvFunction(torch.autograd.Function):
    """A convolution whose weight and bias gradients are kept apart by record.

    x [N·K, C, ...] -> [N·K, O, ...]; groups = 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        slot_set: SlotSet,
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.slot_set, ctx.x_dtype = weight, bias, slot_set, x.dtype
        ctx.geometry = geometry
        dtype = compute_dtype(x)
        with as_written(x):
            x = x.to(dtype)
            ctx.save_for_backward(x)
            bias = None if bias is None else bias.to(dtype)
            return geometry.convolve(x, weight.to(dtype), bias)

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
        slot_set, weight, bias = ctx.slot_set, ctx.weight, ctx.bias
        slot_set.on_backward()
        (x,) = ctx.saved_tensors
        with as_written(backprops):
            if weight.requires_grad:
                out, kernel_size = slot_set.view(weight), weight.shape[2:]
                grads = ctx.geometry.weight_grads(x, backprops, kernel_size, out, slot_set)
                slot_set.record(weight, grads)
            if bias is not None and bias.requires_grad:
                grads = ops.bias_per_record_grads(
                    backprops.movedim(1, -1),
                    n_records=slot_set.n_slots,
                    out=slot_set.view(bias),
                    impl=slot_set.impl,
                )
                slot_set.record(bias, grads)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = ctx.geometry.input_grad(backprops, x, weight.to(x.dtype)).to(ctx.x_dtype)
        return dx, None, None, None, None


def covers(layer: nn.Module) -> bool:
    """Whether the rule holds for a convolution as it is configured."""
    # A subclass may change the convolution and inherit the forward that calls it.
    own = type(layer)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward)
    numeric = isinstance(layer.padding, tuple) and layer.padding_mode == "zeros"
    return own and numeric and layer.groups == 1


def forward(layer: nn.Conv1d | nn.Conv2d, slot_set: SlotSet, x: Tensor) -> Tensor:
    """The layer's forward pass, the gradients of its parameters kept apart by record."""
    return ConvFunction.apply(x, layer.weight, layer.bias, Geometry.of(layer), slot_set)
