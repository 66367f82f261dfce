"""Each op of a layer on a device: ours, the eager specification, and Opacus' formula."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpengine.kernels import ops

from .shapes import Shape

IMPLS = ("triton", "eager", "opacus")
CONV = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
USED = {
    "lora_forward": ("x", "y", "y", "h", "lora_a", "lora_b"),
    "lora_side_b": ("g", "h", "h", "lora_b", "grad_b"),
    "lora_side_a": ("x", "dx", "dx", "h", "lora_a", "grad_a"),
    "lora_conv_side_a": ("x", "h", *["grad_a"] * 9),
    "per_record_product": ("g", "x", "full"),
    "product_sq_norms": ("g", "x"),
    "weighted_product": ("g", "x"),
    "clipped_product": ("h", "x"),
    "gram_sq_norms": ("g", "x"),
    "embedding_per_record_grads": ("g", "ids"),
    "bias_per_record_grads": ("g",),
    "scale_per_record_grads": ("g", "y"),
}
"""What each op must read and write, each as often as it stands here."""


def applies(op: str, shape: Shape) -> bool:
    """Whether ``op`` makes sense there: convolutions on squares, Gram matrices for few rows."""
    if op == "lora_conv_side_a":
        return int(shape.tokens**0.5) ** 2 == shape.tokens
    return op != "gram_sq_norms" or shape.tokens * shape.draws <= 256


def make_inputs(op: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random inputs of what ``op`` uses."""
    rows, n = shape.n_records * shape.draws, shape.n_records
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
        "ids": (rows, shape.tokens),
    }
    inputs: dict[str, Any] = {"n": n, "kept": torch.ones(n, dtype=torch.bool, device=device)}
    for name in set(USED[op]):
        if name == "ids":
            inputs[name] = torch.randint(10, sizes[name], device=device)
        else:
            narrow = name in ("x", "g", "y", "dx", "h")
            made = torch.randn(sizes[name], device=device)
            inputs[name] = made.to(dtype) if narrow else made
    return inputs


def bytes_of(op: str, inputs: dict[str, Any]) -> int:
    return sum(inputs[name].nbytes for name in USED[op])


def caller(op: str, impl: str) -> Callable[[dict[str, Any]], Any]:
    """A function of ``make_inputs`` that runs ``op`` by ``impl``."""
    if impl == "opacus":
        return lambda i: _opacus(op, i)
    kind = "triton" if impl == "triton" else "reference"
    return lambda i: _ours(op, i, kind)


def _image(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _ours(op: str, i: dict[str, Any], kind: ops.Impl) -> None:
    run, n = getattr(ops, op), i["n"]
    if op == "lora_forward":
        run(i["y"], i["x"], i["lora_a"], i["lora_b"], scaling=1.0, impl=kind)
    elif op == "lora_side_b":
        run(i["g"], i["h"], i["lora_b"], scaling=1.0, n_records=n, out=i["grad_b"], impl=kind)
    elif op == "lora_side_a":
        out, dx = i["grad_a"], i["dx"]
        run(i["x"], i["h"], i["lora_a"], n_records=n, input_grad=dx, out=out, impl=kind)
    elif op == "lora_conv_side_a":
        run(_image(i["x"]), _image(i["h"]), **CONV, n_records=n, impl=kind)
    elif op == "weighted_product":
        weights = i["kept"].double()
        run(i["g"], i["x"], weights, i["kept"], n_records=n, impl=kind)
    elif op == "clipped_product":
        run(i["h"], i["x"], i["kept"], n_records=n, max_grad_norm=1.0, impl=kind)
    elif op == "embedding_per_record_grads":
        run(i["ids"], i["g"], num_embeddings=10, n_records=n, impl=kind)
    elif op == "bias_per_record_grads":
        run(i["g"], n_records=n, impl=kind)
    elif op == "scale_per_record_grads":
        run(i["g"], i["y"], n_records=n, impl=kind)
    else:
        run(i["g"], i["x"], n_records=n, impl=kind)


def _opacus(op: str, i: dict[str, Any]) -> None:
    """What PEFT and Opacus' hooks (ghost mode for Gram norms) do for the same layer."""
    n = i["n"]
    if op == "lora_forward":
        a, b = (i[name].to(i["x"].dtype) for name in ("lora_a", "lora_b"))
        i["y"] + 1.0 * ((i["x"] @ a.T) @ b.T)
    elif op == "lora_side_b":
        i["g"] @ i["lora_b"].to(i["g"].dtype)
        _einsum(i["g"], i["h"], n).flatten(1).norm(dim=1)
    elif op == "lora_side_a":
        i["dx"] + i["h"] @ i["lora_a"].to(i["h"].dtype)
        _einsum(i["h"], i["x"], n).flatten(1).norm(dim=1)
    elif op == "lora_conv_side_a":
        unfolded = F.unfold(_image(i["x"]), (3, 3), padding=1).mT
        _einsum(i["h"], unfolded, n).flatten(1).norm(dim=1)
    elif op in ("weighted_product", "clipped_product"):
        left = i["g"] if op == "weighted_product" else i["h"]
        grads = _einsum(left, i["x"], n)
        factors = grads.flatten(1).norm(dim=1).reciprocal().clamp(max=1)
        torch.einsum("i,i...", factors, grads)
    elif op == "gram_sq_norms":
        g, x = (t.reshape(n, -1, t.shape[-1]) for t in (i["g"], i["x"]))
        gram = torch.einsum("nik,njk->nij", g, g) * torch.einsum("nik,njk->nij", x, x)
        gram.sum((1, 2)).clamp(min=0).sqrt()
    elif op == "embedding_per_record_grads":
        ids, g = i["ids"].view(n, -1), i["g"].reshape(n, -1, i["g"].shape[-1])
        grads = g.new_zeros(n, 10, g.shape[-1])
        grads.scatter_add_(1, ids[..., None].expand_as(g), g)
        grads.flatten(1).norm(dim=1)
    elif op == "bias_per_record_grads":
        i["g"].reshape(n, -1, i["g"].shape[-1]).sum(1).norm(dim=1)
    elif op == "scale_per_record_grads":
        (i["g"] * i["y"]).reshape(n, -1, i["g"].shape[-1]).sum(1).norm(dim=1)
    else:
        _einsum(i["g"], i["x"], n).flatten(1).norm(dim=1)


def _einsum(backprops: Tensor, activations: Tensor, n: int) -> Tensor:
    g, x = (t.reshape(n, -1, t.shape[-1]) for t in (backprops, activations))
    return torch.einsum("n...i,n...j->nij", g, x)
