"""Every op on random inputs of a named shape, by either implementation, and how wrong it is.

The tests run these cases in Triton's interpreter, `bench.gpu` on a device. The yardstick is eager
PyTorch: both are measured against float64 on the same rounded inputs.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dpengine.kernels import ops

from .shapes import Shape

MAX_GRAD_NORM = 0.3
LOSS_SCALE = 1 / 3
GAMMA = 0.05
SCALING = 0.7
CONV = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


@dataclass(frozen=True)
class Inputs:
    """What the ops take; [N·K, T, ...] tensors may be views with any strides."""

    shape: Shape
    x: Tensor
    g: Tensor
    h: Tensor
    u: Tensor
    dx: Tensor
    y: Tensor
    lora_a: Tensor
    lora_b: Tensor
    ids: Tensor
    images: Tensor
    pixel_grads: Tensor
    slab: Tensor
    sq_norms: Tensor
    weights: Tensor
    keep: Tensor
    values: Tensor
    stream: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in ``dtype``, where they are floating point."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.is_floating_point():
                moved[field.name] = value.to(dtype)
        return replace(self, **moved)


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, strided: bool = False, seed: int = 0
) -> Inputs:
    """Random inputs; with ``strided``, features lie apart and rows and tokens are interleaved."""
    generator = torch.Generator().manual_seed(seed)
    rows, n = shape.n_records * shape.draws, shape.n_records

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    def tokens(features: int) -> Tensor:
        if strided:
            return normal(features, shape.tokens, rows + 1)[:, :, :rows].permute(2, 1, 0)
        return normal(rows, shape.tokens, features)

    height, width = 6, 5
    out_height, out_width = _conv_size(height, 0), _conv_size(width, 1)
    images = normal(rows, height, width, shape.in_features).permute(0, 3, 1, 2)
    slab = normal(n, 3 * shape.in_features + 1)
    scale = 10 ** torch.randn(n, 1, generator=generator)
    slab = (slab.float() * scale.to(device)).to(dtype)
    return Inputs(
        shape=shape,
        x=tokens(shape.in_features),
        g=tokens(shape.out_features),
        h=tokens(shape.rank),
        u=tokens(shape.rank),
        dx=normal(rows, shape.tokens, shape.in_features),
        y=normal(rows, shape.tokens, shape.out_features),
        # Weights stay float32 beside activations of a narrower type, which they are rounded to.
        lora_a=normal(shape.rank, shape.in_features).float(),
        lora_b=normal(shape.out_features, shape.rank).float(),
        ids=torch.randint(0, 5, (rows, shape.tokens), generator=generator).to(device),
        images=images if strided else images.contiguous(),
        pixel_grads=normal(rows, shape.rank, out_height, out_width),
        slab=slab,
        sq_norms=slab.double().square().sum(1),
        weights=torch.rand(n, generator=generator, dtype=torch.float64).to(device),
        keep=(torch.arange(n) % 3 != 1).to(device),
        values=torch.randn(3 * shape.in_features + 1, generator=generator).double().to(device),
        stream=torch.randint(-(2**31), 2**31, (12,), generator=generator).int().to(device),
    )


def _conv_size(size: int, axis: int) -> int:
    reach = CONV["dilation"][axis] * (CONV["kernel_size"][axis] - 1) + 1
    return (size + 2 * CONV["padding"][axis] - reach) // CONV["stride"][axis] + 1


def _lora_forward(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    output = i.y.clone()
    h = ops.lora_forward(output, i.x, i.lora_a, i.lora_b, scaling=SCALING, impl=impl)
    return {"output": output, "h": h}


def _lora_side_b(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    u, grad_b = ops.lora_side_b(
        i.g, i.h, i.lora_b, scaling=SCALING, n_records=i.shape.n_records, impl=impl
    )
    return {"u": u, "grad": grad_b}


def _lora_side_a(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    input_grad = i.dx.clone()
    grad_a = ops.lora_side_a(
        i.x, i.u, i.lora_a, n_records=i.shape.n_records, input_grad=input_grad, impl=impl
    )
    return {"input_grad": input_grad, "grad": grad_a}


def _lora_conv_side_a(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    grad = ops.lora_conv_side_a(
        i.images, i.pixel_grads, **CONV, n_records=i.shape.n_records, impl=impl
    )
    return {"grad": grad}


def _per_record_product(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    grad = ops.per_record_product(i.g, i.x, n_records=i.shape.n_records, impl=impl)
    return {"grad": grad}


def _product_sq_norms(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    sq_norms = ops.product_sq_norms(i.g, i.x, n_records=i.shape.n_records, impl=impl)
    return {"norms": sq_norms.sum(1).sqrt()}


def _weighted_product(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    return {
        "sum": ops.weighted_product(
            i.g, i.x, i.weights, i.keep, n_records=i.shape.n_records, impl=impl
        )
    }


def _embedding(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    grad = ops.embedding_per_record_grads(
        i.ids, i.g, num_embeddings=6, n_records=i.shape.n_records, padding_idx=2, impl=impl
    )
    return {"grad": grad}


def _bias(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    grad = ops.bias_per_record_grads(i.g, n_records=i.shape.n_records, impl=impl)
    return {"grad": grad}


def _scale(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    grad = ops.scale_per_record_grads(i.x, i.dx, n_records=i.shape.n_records, impl=impl)
    return {"grad": grad}


def _sq_norms(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    return {"sq_norms": ops.sq_norms([i.slab], impl=impl)}


def _clip_and_sum(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    flat, automatic = (
        ops.clip_and_sum(
            [i.slab],
            i.sq_norms,
            i.keep,
            max_grad_norm=MAX_GRAD_NORM,
            loss_scale=LOSS_SCALE,
            gamma=gamma,
            impl=impl,
        )
        for gamma in (None, GAMMA)
    )
    return {"sum": flat, "automatic": automatic}


def _add_noise(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    noisy = ops.add_noise(i.values, i.stream, noise_stddev=0.3, divisor=7.0, impl=impl)
    return {"noisy": noisy}


def _gram_sq_norms(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    bound = ops.gram_sq_norms(i.g, i.x, n_records=i.shape.n_records, impl=impl)
    return {"upper_bound": bound.sum(1).sqrt()}


def _chacha20_words(i: Inputs, impl: ops.Impl) -> dict[str, Tensor]:
    return {"words": ops.chacha20_words(i.stream, 131, impl=impl)}


OPS: dict[str, Callable[[Inputs, ops.Impl], dict[str, Tensor]]] = {
    "lora_forward": _lora_forward,
    "lora_side_b": _lora_side_b,
    "lora_side_a": _lora_side_a,
    "lora_conv_side_a": _lora_conv_side_a,
    "per_record_product": _per_record_product,
    "product_sq_norms": _product_sq_norms,
    "weighted_product": _weighted_product,
    "embedding": _embedding,
    "bias": _bias,
    "scale": _scale,
    "sq_norms": _sq_norms,
    "clip_and_sum": _clip_and_sum,
    "add_noise": _add_noise,
    "gram_sq_norms": _gram_sq_norms,
    "chacha20_words": _chacha20_words,
}
IN_FLOAT64 = ("sq_norms", "clip_and_sum", "add_noise")
"""Ops that compute in float64 whatever the inputs' type."""


def check(op: str, inputs: Inputs) -> list[str]:
    """What is wrong with the kernels of ``op`` on ``inputs``; nothing, if all is well.

    Each output is at most twice as wrong as the eager one, but for one rounding of the result;
    words are equal, upper bounds are above and close. A second call gives the same bits, and no
    output is left unwritten.
    """
    run = OPS[op]
    exact = run(inputs.to(torch.float64), "reference")
    eager = run(inputs, "reference")
    with _poisoned_memory():
        first, second = run(inputs, "triton"), run(inputs, "triton")
    problems = []
    for name, truth in exact.items():
        ours = first[name]
        if ours.shape != eager[name].shape or ours.dtype != eager[name].dtype:
            problems.append(f"{op}: {name} is {ours.dtype} {tuple(ours.shape)}")
        elif problem := _compare(op, name, ours, eager[name], truth):
            problems.append(f"{op}: {name} {problem}")
        if not torch.equal(ours, second[name]):
            problems.append(f"{op}: {name} differs between two calls")
    return problems


def _compare(op: str, name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> str:
    if name == "words":
        return "" if torch.equal(ours, eager) else "differ"
    if name == "upper_bound":
        sound = (ours >= truth).all() and (ours <= 1.05 * truth).all()
        return "" if sound else f"is {ours.tolist()} for norms of {truth.tolist()}"
    error, eager_error = ((t.double() - truth).norm() for t in (ours, eager))
    if op in IN_FLOAT64:
        rounding = 8 * torch.finfo(torch.float64).eps * truth.norm()
    else:
        # Float64 results of float32 products inherit the products' rounding.
        dtype = torch.float32 if ours.dtype == torch.float64 else ours.dtype
        rounding = torch.finfo(dtype).eps / 2 * truth.norm()
    if error <= 2 * eager_error + rounding:
        return ""
    return (
        f"is off by {error:.3g}, eager PyTorch by {eager_error:.3g}, one rounding is {rounding:.3g}"
    )


@contextmanager
def _poisoned_memory():
    """New memory holds NaN, so that an output nobody writes cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
