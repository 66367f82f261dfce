"""The Triton ops with the signatures of their specification in `reference`.

Each function allocates the outputs and calls an operator of `operators`, so that graphs see every
write. Triton is imported when one is called.
"""

import torch
from torch import Tensor

from .. import reference
from . import operators as operators  # registers torch.ops.dpengine


def lora_forward(
    base_output: Tensor, activations: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    h = activations.new_empty(*activations.shape[:-1], len(lora_a))
    torch.ops.dpengine.lora_forward(
        _in_place(base_output), _rows(activations), lora_a, lora_b, scaling, _rows(h)
    )
    return h


def lora_side_b(
    backprops: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    n_records: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    u = backprops.new_empty(*backprops.shape[:-1], lora_b.shape[1])
    grad_b = _grad(out, n_records, *lora_b.shape, like=backprops)
    torch.ops.dpengine.lora_side_b(_rows(backprops), _rows(h), lora_b, scaling, _rows(u), grad_b)
    return u, grad_b


def lora_side_a(
    activations: Tensor,
    u: Tensor,
    lora_a: Tensor,
    n_records: int,
    input_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    grad = _grad(out, n_records, u.shape[-1], activations.shape[-1], like=activations)
    torch.ops.dpengine.per_record_product(
        _rows(u),
        _rows(activations),
        lora_a,
        None if input_grad is None else _in_place(input_grad),
        grad,
    )
    return grad


def per_record_product(
    left: Tensor, right: Tensor, n_records: int, out: Tensor | None = None
) -> Tensor:
    return lora_side_a(right, left, None, n_records, None, out)


def lora_conv_side_a(
    activations: Tensor,
    u: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    n_records: int,
    out: Tensor | None = None,
) -> Tensor:
    rank, channels = u.shape[1], activations.shape[1]
    grad_a = _grad(out, n_records, rank, channels, *kernel_size, like=activations)
    torch.ops.dpengine.lora_conv_side_a(activations, u, stride, padding, dilation, grad_a)
    return grad_a


def product_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    from . import product_sq_norms as kernel

    columns = kernel.sq_norm_columns(left.shape[-1], right.shape[-1])
    sq_norms = _partial_sq_norms(n_records, columns, left)
    torch.ops.dpengine.product_sq_norms(_rows(left), _rows(right), sq_norms)
    return sq_norms


def weighted_product(left: Tensor, right: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    sums = _group_sums(len(weights), left, right)
    torch.ops.dpengine.weighted_product(
        _rows(left), _rows(right), weights.double().contiguous(), keep.contiguous(), sums
    )
    return sums.sum(0)


def gram_sq_norms(left: Tensor, right: Tensor, n_records: int) -> Tensor:
    from . import gram as kernel

    n_rows = left.shape[:-1].numel() // max(n_records, 1)
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


def embedding_per_record_grads(
    ids: Tensor,
    backprops: Tensor,
    num_embeddings: int,
    n_records: int,
    padding_idx: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    grad = _grad(out, n_records, num_embeddings, backprops.shape[-1], like=backprops)
    rows = _rows(ids.unsqueeze(-1)).squeeze(-1)
    torch.ops.dpengine.embedding(rows, _rows(backprops), padding_idx, grad)
    return grad


def bias_per_record_grads(backprops: Tensor, n_records: int, out: Tensor | None = None) -> Tensor:
    return scale_per_record_grads(backprops, None, n_records, out)


def scale_per_record_grads(
    backprops: Tensor,
    normalized: Tensor | None,
    n_records: int,
    out: Tensor | None = None,
) -> Tensor:
    grad = _grad(out, n_records, backprops.shape[-1], like=backprops)
    factor = None if normalized is None else _rows(normalized)
    torch.ops.dpengine.column_sums(_rows(backprops), factor, grad)
    return grad


def sq_norms(per_record_grads: list[Tensor]) -> Tensor:
    from . import sq_norms as kernel

    partial = []
    for grads in per_record_grads:
        columns = kernel.sq_norm_columns(grads.shape[1:].numel())
        partial.append(_partial_sq_norms(len(grads), columns, grads))
        torch.ops.dpengine.sq_norms(_records(grads), partial[-1])
    return reference.sum_sq_norms(partial)


def clip_and_sum(
    per_record_grads: list[Tensor],
    sq_norms: Tensor,
    keep: Tensor,
    max_grad_norm: float,
    loss_scale: float,
    gamma: float | None = None,
) -> Tensor:
    sizes = [grads.shape[1:].numel() for grads in per_record_grads]
    sq_norms, keep = sq_norms.contiguous(), keep.contiguous()
    limits = reference.factor_limits(gamma)
    total = sq_norms.new_empty(sum(sizes))
    for grads, part in zip(per_record_grads, total.split(sizes), strict=True):
        torch.ops.dpengine.clip_and_sum(
            _records(grads), sq_norms, keep, max_grad_norm, loss_scale, *limits, part
        )
    return total


def add_noise(values: Tensor, stream: Tensor, noise_stddev: float, divisor: float) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    torch.ops.dpengine.add_noise(values, stream.contiguous(), noise_stddev, divisor, out)
    return out


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


def _grad(out: Tensor | None, *shape: int, like: Tensor) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32) if out is None else out


def _partial_sq_norms(n_records: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(n_records, columns, dtype=torch.float64)


def _group_sums(n_records: int, left: Tensor, right: Tensor) -> Tensor:
    from . import tiling

    groups = tiling.ceil_div(n_records, tiling.RECORDS)
    return left.new_empty(groups, left.shape[-1], right.shape[-1], dtype=torch.float64)
