"""The Triton ops as PyTorch operators: registered, with what `torch.compile` needs to know.

Each function here has the signature of its specification in `reference`, allocates the outputs and
calls an operator `dpengine::*`, which runs the launches of one kernel file. The operators write
into tensors they are given, so that graphs see every write. Triton is imported when one is called.
"""

import torch
from torch import Tensor

from . import reference


@torch.library.custom_op("dpengine::lora_forward", mutates_args=("base_output", "h"))
def _lora_forward(
    base_output: Tensor,
    activations: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    h: Tensor,
) -> None:
    from . import launch, lora_forward

    launch.run(lora_forward.launches(base_output, activations, lora_a, lora_b, scaling, h))


def lora_forward(
    base_output: Tensor, activations: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    h = activations.new_empty(*activations.shape[:-1], len(lora_a))
    torch.ops.dpengine.lora_forward(
        _in_place(base_output), _rows(activations), lora_a, lora_b, scaling, _rows(h)
    )
    return h


@torch.library.custom_op("dpengine::lora_side_b", mutates_args=("u", "grad_b", "sq_norms"))
def _lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    u: Tensor,
    grad_b: Tensor,
    sq_norms: Tensor,
) -> None:
    from . import launch, lora_side_b

    launch.run(lora_side_b.launches(backprops, h, lora_b, scaling, u, grad_b, sq_norms))


def lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    n_records: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import lora_side_b as kernel

    u = backprops.new_empty(*backprops.shape[:-1], lora_b.shape[1])
    grad_b = _grad(out, n_records, *lora_b.shape, like=backprops)
    n_rows = _rows_per_record(backprops, n_records)
    columns = kernel.sq_norm_columns(n_rows, *lora_b.shape, backprops.element_size())
    sq_norms = _partial_sq_norms(n_records, columns, backprops)
    torch.ops.dpengine.lora_side_b(
        _rows(backprops), _rows(h), lora_b, scaling, _rows(u), grad_b, sq_norms
    )
    return u, grad_b, sq_norms


@torch.library.custom_op(
    "dpengine::per_record_product", mutates_args=("input_grad", "grad", "sq_norms")
)
def _per_record_product(
    left: Tensor,
    right: Tensor,
    lora_a: Tensor | None,
    input_grad: Tensor | None,
    grad: Tensor,
    sq_norms: Tensor,
) -> None:
    from . import launch, product

    launch.run(product.launches(left, right, grad, sq_norms, lora_a, input_grad))


def lora_side_a(
    activations: Tensor,
    u: Tensor,
    lora_a: Tensor,
    n_records: int,
    input_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from . import product

    grad = _grad(out, n_records, u.shape[-1], activations.shape[-1], like=activations)
    n_rows = _rows_per_record(activations, n_records)
    columns = product.sq_norm_columns(n_rows, *grad.shape[1:], activations.element_size())
    sq_norms = _partial_sq_norms(n_records, columns, activations)
    torch.ops.dpengine.per_record_product(
        _rows(u),
        _rows(activations),
        lora_a,
        None if input_grad is None else _in_place(input_grad),
        grad,
        sq_norms,
    )
    return grad, sq_norms


def per_record_product(
    left: Tensor, right: Tensor, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return lora_side_a(right, left, None, n_records, None, out)


@torch.library.custom_op("dpengine::lora_conv_side_a", mutates_args=("grad_a", "sq_norms"))
def _lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    grad_a: Tensor,
    sq_norms: Tensor,
) -> None:
    from . import launch, lora_conv

    launch.run(lora_conv.launches(activations, u, stride, padding, dilation, grad_a, sq_norms))


def lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    n_records: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from . import lora_conv

    rank, channels = u.shape[1], activations.shape[1]
    grad_a = _grad(out, n_records, rank, channels, *kernel_size, like=activations)
    n_pixels = len(u) // max(n_records, 1) * u.shape[2] * u.shape[3]
    columns = lora_conv.sq_norm_columns(
        n_pixels, rank, channels, kernel_size, activations.element_size()
    )
    sq_norms = _partial_sq_norms(n_records, columns, activations)
    torch.ops.dpengine.lora_conv_side_a(activations, u, stride, padding, dilation, grad_a, sq_norms)
    return grad_a, sq_norms


@torch.library.custom_op("dpengine::product_sq_norms", mutates_args=("sq_norms",))
def _product_sq_norms(left: Tensor, right: Tensor, sq_norms: Tensor) -> None:
    from . import launch, product_sq_norms

    launch.run(product_sq_norms.launches(left, right, sq_norms))


def product_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    from . import product_sq_norms as kernel

    columns = kernel.sq_norm_columns(left.shape[-1], right.shape[-1])
    sq_norms = _partial_sq_norms(n_records, columns, left)
    torch.ops.dpengine.product_sq_norms(_rows(left), _rows(right), sq_norms)
    return sq_norms


@torch.library.custom_op("dpengine::weighted_product", mutates_args=("sums",))
def _weighted_product(
    left: Tensor, right: Tensor, weights: Tensor, keep: Tensor, sums: Tensor
) -> None:
    from . import launch, weighted_product

    launch.run(weighted_product.launches(left, right, weights, keep, sums))


def weighted_product(left: Tensor, right: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    sums = _group_sums(len(weights), left, right)
    torch.ops.dpengine.weighted_product(
        _rows(left), _rows(right), weights.double().contiguous(), keep.contiguous(), sums
    )
    return sums.sum(0)


@torch.library.custom_op("dpengine::gram", mutates_args=("gram", "row_norms"))
def _gram(left: Tensor, right: Tensor, gram: Tensor, row_norms: Tensor) -> None:
    from . import gram as kernel
    from . import launch

    launch.run(kernel.launches(left, right, gram, row_norms))


def gram_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    from . import gram as kernel

    n_rows = _rows_per_record(left, n_records)
    blocks = kernel.n_blocks(n_rows)
    gram = left.new_empty(n_records, blocks, blocks, dtype=torch.float64)
    row_norms = left.new_empty(n_records, blocks, 3, dtype=torch.float64)
    torch.ops.dpengine.gram(_rows(left), _rows(right), gram, row_norms)
    return reference.gram_upper_bound(
        gram.sum((1, 2)),
        row_norms.sum(1),
        n_rows,
        left.shape[-1] + right.shape[-1],
        torch.float32,
        torch.float32,
    )[:, None]


@torch.library.custom_op("dpengine::clipped_product", mutates_args=("sums",))
def _clipped_product(
    left: Tensor,
    right: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    sums: Tensor,
) -> None:
    from . import clipped_product, launch

    launch.run(clipped_product.launches(left, right, keep, max_grad_norm, loss_scale, sums))


def clipped_product(
    left: Tensor, right: Tensor, keep: Tensor, max_grad_norm: float, loss_scale: float
) -> Tensor:
    from . import tiling

    if not tiling.fits_on_chip(left.shape[-1], right.shape[-1]):
        sq_norms = product_sq_norms(left, right, len(keep)).sum(1) * loss_scale**2
        weights = loss_scale * reference.clip_factors(sq_norms, max_grad_norm).double()
        return weighted_product(left, right, weights, keep & sq_norms.isfinite())
    sums = _group_sums(len(keep), left, right)
    torch.ops.dpengine.clipped_product(
        _rows(left), _rows(right), keep.contiguous(), max_grad_norm, loss_scale, sums
    )
    return sums.sum(0)


@torch.library.custom_op("dpengine::embedding", mutates_args=("grad", "sq_norms"))
def _embedding(
    ids: Tensor, backprops: Tensor, padding_idx: int | None, grad: Tensor, sq_norms: Tensor
) -> None:
    from . import embedding, launch

    launch.run(embedding.launches(ids, backprops, padding_idx, grad, sq_norms))


def embedding_per_record_grads(
    ids: Tensor,
    backprops: Tensor,
    num_embeddings: int,
    n_records: int,
    padding_idx: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from . import embedding

    features = backprops.shape[-1]
    grad = _grad(out, n_records, num_embeddings, features, like=backprops)
    columns = embedding.sq_norm_columns(_rows_per_record(backprops, n_records), features)
    sq_norms = _partial_sq_norms(n_records, columns, backprops)
    rows = _rows(ids.unsqueeze(-1)).squeeze(-1)
    torch.ops.dpengine.embedding(rows, _rows(backprops), padding_idx, grad, sq_norms)
    return grad, sq_norms


@torch.library.custom_op("dpengine::column_sums", mutates_args=("grad", "sq_norms"))
def _column_sums(
    backprops: Tensor, normalized: Tensor | None, grad: Tensor, sq_norms: Tensor
) -> None:
    from . import column_sums, launch

    launch.run(column_sums.launches(backprops, normalized, grad, sq_norms))


def bias_per_record_grads(
    backprops: Tensor, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return scale_per_record_grads(backprops, None, n_records, out)


def scale_per_record_grads(
    backprops: Tensor, normalized: Tensor | None, n_records: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from . import column_sums

    grad = _grad(out, n_records, backprops.shape[-1], like=backprops)
    columns = column_sums.sq_norm_columns(
        _rows_per_record(backprops, n_records), backprops.shape[-1]
    )
    sq_norms = _partial_sq_norms(n_records, columns, backprops)
    factor = None if normalized is None else _rows(normalized)
    torch.ops.dpengine.column_sums(_rows(backprops), factor, grad, sq_norms)
    return grad, sq_norms


@torch.library.custom_op("dpengine::sq_norms", mutates_args=("sq_norms",))
def _sq_norms(grads: Tensor, sq_norms: Tensor) -> None:
    from . import launch
    from . import sq_norms as kernel

    launch.run(kernel.launches(grads, sq_norms))


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    from . import sq_norms as kernel

    partial = []
    for grads in per_record_grads:
        columns = kernel.sq_norm_columns(grads.shape[1:].numel())
        partial.append(_partial_sq_norms(len(grads), columns, grads))
        torch.ops.dpengine.sq_norms(_records(grads), partial[-1])
    return reference.sum_sq_norms(partial)


@torch.library.custom_op("dpengine::clip_and_sum", mutates_args=("total",))
def _clip_and_sum(
    grads: Tensor,
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    total: Tensor,
) -> None:
    from . import clip_and_sum, launch

    launch.run(clip_and_sum.launches(grads, sq_norms, keep, max_grad_norm, loss_scale, total))


def clip_and_sum(
    per_record_grads: list[Tensor],
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
) -> Tensor:
    sizes = [grads.shape[1:].numel() for grads in per_record_grads]
    sq_norms, keep = sq_norms.contiguous(), keep.contiguous()
    total = sq_norms.new_empty(sum(sizes))
    for grads, part in zip(per_record_grads, total.split(sizes), strict=True):
        torch.ops.dpengine.clip_and_sum(
            _records(grads), sq_norms, keep, max_grad_norm, loss_scale, part
        )
    return total


@torch.library.custom_op("dpengine::add_noise", mutates_args=("out",))
def _add_noise(
    values: Tensor, stream: Tensor, noise_stddev: float, divisor: float, out: Tensor
) -> None:
    from . import launch, noise

    launch.run(noise.launches(values, stream, noise_stddev, divisor, out))


def add_noise(values: Tensor, stream: Tensor, noise_stddev: float, divisor: float) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    torch.ops.dpengine.add_noise(values, stream.contiguous(), noise_stddev, divisor, out)
    return out


@torch.library.custom_op("dpengine::chacha20_words", mutates_args=("words",))
def _chacha20_words(stream: Tensor, words: Tensor) -> None:
    from . import launch, noise

    launch.run(noise.words_launches(stream, words))


def chacha20_words(stream: Tensor, n_blocks: int) -> Tensor:
    words = stream.new_empty(n_blocks, 8, dtype=torch.int64)
    torch.ops.dpengine.chacha20_words(stream.contiguous(), words)
    return words


def _rows(x: Tensor) -> Tensor:
    """``x`` [N·K, ..., F] as [N·K, T, F]; a copy only where strides leave no other way."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _in_place(x: Tensor) -> Tensor:
    return x.view(len(x), x.shape[1:-1].numel(), x.shape[-1])


def _records(grads: Tensor) -> Tensor:
    """``grads`` [N, ...] with each record in one piece; those of a slab are."""
    return grads if grads[:1].is_contiguous() else grads.contiguous()


def _rows_per_record(x: Tensor, n_records: int) -> int:
    return x.shape[:-1].numel() // max(n_records, 1)


def _grad(out: Tensor | None, *shape: int, like: Tensor) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32) if out is None else out


def _partial_sq_norms(n_records: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(n_records, columns, dtype=torch.float64)


def _group_sums(n_records: int, left: Tensor, right: Tensor) -> Tensor:
    from . import tiling

    groups = tiling.ceil_div(n_records, tiling.RECORDS)
    return left.new_empty(groups, left.shape[-1], right.shape[-1], dtype=torch.float64)
