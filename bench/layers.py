"""Each op of a layer on a device: ours, the eager specification, and Opacus' formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpengine.kernels import ops

from .shapes import Shape

IMPLS = ("triton", "eager", "opacus")
NUM_EMBEDDINGS = 10
CONV = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
USED = {
    "lora_forward": ("x", "y", "y", "h", "lora_a", "lora_b"),
    "lora_side_b": ("g", "h", "h", "lora_b", "grad_b"),
    "lora_side_a": ("x", "dx", "dx", "h", "lora_a", "grad_a"),
    "lora_conv_side_a": ("images", "pixel_grads", *["grad_a"] * 9),
    "per_record_product": ("g", "x", "full"),
    "product_sq_norms": ("g", "x"),
    "weighted_product": ("g", "x", "full_sum"),
    "gram_sq_norms": ("g", "x"),
    "embedding_per_record_grads": ("g", "ids", "embedding"),
    "bias_per_record_grads": ("g", "bias"),
    "scale_per_record_grads": ("g", "y", "bias"),
}
"""What each op must read and write, each as often as it stands here; but for norms and weights."""
OUTPUTS = {
    "lora_forward": ("output",),
    "lora_side_b": ("u", "grad"),
    "lora_side_a": ("input_grad", "grad"),
    "lora_conv_side_a": ("grad",),
    "per_record_product": ("grad",),
    "product_sq_norms": ("norms",),
    "weighted_product": ("sum",),
    "gram_sq_norms": ("norms",),
    "embedding_per_record_grads": ("grad",),
    "bias_per_record_grads": ("grad",),
    "scale_per_record_grads": ("grad",),
}
"""What each op gives, of our ``gram_sq_norms`` an upper bound."""
_WIDE = dict.fromkeys(
    ("lora_a", "lora_b", "grad_a", "grad_b", "full", "embedding", "bias"), torch.float32
) | {"full_sum": torch.float64}
"""Weights, gradients of records and sums, whatever type activations have."""


def applies(op: str, shape: Shape) -> bool:
    """Whether ``op`` makes sense there: convolutions on squares, Gram matrices for few rows."""
    if op == "lora_conv_side_a":
        return int(shape.tokens**0.5) ** 2 == shape.tokens
    return op != "gram_sq_norms" or shape.tokens * shape.draws <= 256


def make_inputs(op: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random inputs of what ``op`` uses."""
    rows, n, side = shape.n_records * shape.draws, shape.n_records, int(shape.tokens**0.5)
    classes = NUM_EMBEDDINGS
    sizes = {
        "x": (rows, shape.tokens, shape.in_features),
        "g": (rows, shape.tokens, shape.out_features),
        "y": (rows, shape.tokens, shape.out_features),
        "dx": (rows, shape.tokens, shape.in_features),
        "h": (rows, shape.tokens, shape.rank),
        "lora_a": (shape.rank, shape.in_features),
        "lora_b": (shape.out_features, shape.rank),
        "grad_a": (n, shape.rank, shape.in_features),
        "grad_b": (n, shape.out_features, shape.rank),
        "full": (n, shape.out_features, shape.in_features),
        "embedding": (n, classes, shape.out_features),
        "bias": (n, shape.out_features),
        "full_sum": (shape.out_features, shape.in_features),
        "ids": (rows, shape.tokens),
        "images": (rows, shape.in_features, side, side),
        "pixel_grads": (rows, shape.rank, side, side),
    }
    inputs: dict[str, Any] = {
        "n": n,
        "kept": torch.ones(n, dtype=torch.bool, device=device),
        "weights": torch.rand(n, dtype=torch.float64, device=device),
    }
    for name in dict.fromkeys(USED[op]):
        if name == "ids":
            inputs[name] = torch.randint(classes, sizes[name], device=device)
        else:
            inputs[name] = torch.randn(sizes[name], device=device).to(_WIDE.get(name, dtype))
    return inputs


def bytes_of(op: str, inputs: dict[str, Any]) -> int:
    """Bytes that one call must move."""
    return sum(inputs[name].nbytes for name in USED[op])


def flops_of(op: str, shape: Shape) -> int:
    """Floating-point operations that one call must do: products, and sums where there are none.

    Norms and clip factors are left out: they are small beside what they are made of.
    """
    n, i, o, r = shape.n_records, shape.in_features, shape.out_features, shape.rank
    rows_of_record = shape.draws * shape.tokens
    rows = n * rows_of_record
    return {
        "lora_forward": 2 * rows * r * (i + o),
        "lora_side_b": 4 * rows * r * o,
        "lora_side_a": 4 * rows * r * i,
        "lora_conv_side_a": 2 * 9 * rows * r * i,
        "per_record_product": 2 * rows * i * o,
        "product_sq_norms": 2 * rows * i * o,
        "weighted_product": 2 * rows * i * o,
        "gram_sq_norms": 2 * n * rows_of_record**2 * (i + o),
        "embedding_per_record_grads": rows * o,
        "bias_per_record_grads": rows * o,
        "scale_per_record_grads": 2 * rows * o,
    }[op]


def summands_of(op: str, shape: Shape) -> int:
    """How many terms the longest sum of one call has: a gradient's entry, a norm, or the batch's.

    A norm sums over all entries of a record's gradient.
    """
    n, i, o, r = shape.n_records, shape.in_features, shape.out_features, shape.rank
    rows_of_record = shape.draws * shape.tokens
    return {
        "lora_forward": max(i, r),
        "lora_side_b": max(rows_of_record, o),
        "lora_side_a": max(rows_of_record, r),
        "lora_conv_side_a": rows_of_record,
        "per_record_product": rows_of_record,
        "product_sq_norms": max(rows_of_record, o * i),
        "weighted_product": n * rows_of_record,
        "gram_sq_norms": max(rows_of_record**2, i, o),
        "embedding_per_record_grads": rows_of_record,
        "bias_per_record_grads": rows_of_record,
        "scale_per_record_grads": rows_of_record,
    }[op]


def depth_of(shape: Shape) -> int:
    """How many additions stand behind one another where long sums are made of blocks.

    A norm adds O sums of I squares, O + I behind one another; its root halves the error.
    """
    return max(shape.draws * shape.tokens, shape.in_features, shape.out_features)


def caller(op: str, impl: str) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    """A function of ``make_inputs`` that runs ``op`` by ``impl``; ``named`` tells what it returns.

    What the op writes to in place is written to, and returned too.
    """
    if impl == "opacus":
        return lambda i: _opacus(op, i)
    kind = "triton" if impl == "triton" else "reference"
    return lambda i: _ours(op, i, kind)


def named(op: str, returned: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What ``caller(op, ...)`` returned, by name; squared norms in parts are made norms [N]."""
    found = dict(zip(OUTPUTS[op], returned, strict=True))
    if "norms" in found and found["norms"].dim() == 2:
        found["norms"] = found["norms"].sum(1).sqrt()
    return found


def _ours(op: str, i: dict[str, Any], kind: ops.Impl) -> tuple[Tensor, ...]:
    run, n = getattr(ops, op), i["n"]
    if op == "lora_forward":
        run(i["y"], i["x"], i["lora_a"], i["lora_b"], scaling=1.0, impl=kind)
        return (i["y"],)
    if op == "lora_side_b":
        return run(
            i["g"], i["h"], i["lora_b"], scaling=1.0, n_records=n, out=i["grad_b"], impl=kind
        )
    if op == "lora_side_a":
        out, dx = i["grad_a"], i["dx"]
        return dx, run(i["x"], i["h"], i["lora_a"], n_records=n, input_grad=dx, out=out, impl=kind)
    if op == "lora_conv_side_a":
        return (run(i["images"], i["pixel_grads"], **CONV, n_records=n, impl=kind),)
    if op == "weighted_product":
        return (run(i["g"], i["x"], i["weights"], i["kept"], n_records=n, impl=kind),)
    if op == "embedding_per_record_grads":
        ids = i["ids"]
        return (run(ids, i["g"], num_embeddings=NUM_EMBEDDINGS, n_records=n, impl=kind),)
    if op == "bias_per_record_grads":
        return (run(i["g"], n_records=n, impl=kind),)
    if op == "scale_per_record_grads":
        return (run(i["g"], i["y"], n_records=n, impl=kind),)
    return (run(i["g"], i["x"], n_records=n, impl=kind),)


def _opacus(op: str, i: dict[str, Any]) -> tuple[Tensor, ...]:
    """What PEFT (``lora_forward``), Opacus' hooks, and ghost mode (Gram norms, weighted products)
    do for the same layer.
    """
    n = i["n"]
    if op == "lora_forward":
        a, b = (i[name].to(i["x"].dtype) for name in ("lora_a", "lora_b"))
        return (i["y"] + 1.0 * ((i["x"] @ a.T) @ b.T),)
    if op == "lora_side_b":
        u = i["g"] @ i["lora_b"].to(i["g"].dtype)
        return u, _einsum(i["g"], i["h"], n)
    if op == "lora_side_a":
        dx = i["dx"].add_(i["h"] @ i["lora_a"].to(i["h"].dtype))  # autograd adds in place
        return dx, _einsum(i["h"], i["x"], n)
    if op == "lora_conv_side_a":
        from opacus.grad_sample.conv import compute_conv_grad_sample

        images, backprops = i["images"], i["pixel_grads"]
        layer = nn.Conv2d(images.shape[1], backprops.shape[1], 3, 1, 1, bias=False, device="meta")
        of_rows = compute_conv_grad_sample(layer, [images], backprops)[layer.weight]
        return (of_rows.unflatten(0, (n, -1)).sum(1),)
    if op == "weighted_product":
        # Ghost mode weighs the losses and goes backward once more: one product over all rows.
        g, x = (t.reshape(n, -1, t.shape[-1]) for t in (i["g"], i["x"]))
        g = g * i["weights"].to(g.dtype)[:, None, None]
        return (torch.einsum("nti,ntj->ij", g, x),)
    if op == "gram_sq_norms":
        g, x = (t.reshape(n, -1, t.shape[-1]) for t in (i["g"], i["x"]))
        gram = (torch.einsum("nik,njk->nij", t, t) for t in (g, x))
        return (torch.einsum("n...i,n...i->n", *gram).clamp(min=0).sqrt(),)
    if op == "product_sq_norms":
        return (_einsum(i["g"], i["x"], n).flatten(1).norm(dim=1),)
    return (_opacus_grads(op, i, n),)


def _opacus_grads(op: str, i: dict[str, Any], n: int) -> Tensor:
    """The gradient of each record, of the ops that make nothing else."""
    g = i["g"].reshape(n, -1, i["g"].shape[-1])
    if op == "embedding_per_record_grads":
        ids = i["ids"].view(n, -1)[..., None].expand_as(g)
        return g.new_zeros(n, NUM_EMBEDDINGS, g.shape[-1]).scatter_add_(1, ids, g)
    if op == "bias_per_record_grads":
        return torch.einsum("n...k->nk", g)
    if op == "scale_per_record_grads":
        return (i["g"] * i["y"]).reshape(g.shape).sum(1)
    return _einsum(i["g"], i["x"], n)


def _einsum(backprops: Tensor, activations: Tensor, n: int) -> Tensor:
    g, x = (t.reshape(n, -1, t.shape[-1]) for t in (backprops, activations))
    return torch.einsum("n...i,n...j->nij", g, x)
