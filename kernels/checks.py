"""Checks of the ops' arguments: each names the argument, the rule and the value."""

import torch
from torch import Tensor

MAX_RANK = 128
"""Ranks up to this fit in one tile of the kernels."""


def same_type(**tensors: Tensor) -> None:
    if len({t.dtype for t in tensors.values()}) != 1:
        types = {name: str(t.dtype) for name, t in tensors.items()}
        raise TypeError(f"{' and '.join(tensors)} must have one dtype, got {types}")


def same_rows(**tensors: Tensor) -> None:
    same_type(**tensors)
    if len({t.shape[:-1] for t in tensors.values()}) != 1:
        shapes = " and ".join(str(tuple(t.shape)) for t in tensors.values())
        raise ValueError(
            f"{' and '.join(tensors)} must agree on all but their last dimension, got {shapes}"
        )


def fits(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} to fit the other arguments, got "
            f"{tuple(tensor.shape)}"
        )


def slab_view(out: Tensor | None) -> None:
    """Each record of ``out`` must lie in one piece, and none on another."""
    if out is None or len(out) == 0:
        return
    if not out[0].is_contiguous() or (len(out) > 1 and out.stride(0) < out[0].numel()):
        raise ValueError(
            "out must hold each record's gradient in one piece, apart from the others, got strides "
            f"{tuple(out.stride())} for shape {tuple(out.shape)}; take a view of a slab [N, P]"
        )


def written(**tensors: Tensor) -> None:
    """Tensors that are added to in place must be contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} is written in place and must be contiguous, got strides "
                f"{tuple(tensor.stride())} for shape {tuple(tensor.shape)}; make it .contiguous()"
            )


def boolean(**tensors: Tensor) -> None:
    """Masks must be bool."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {tensor.dtype}; compare with a number first")


def double(**tensors: Tensor) -> None:
    """Sums that privacy rests on must be float64 vectors."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64 or tensor.ndim != 1:
            raise TypeError(
                f"{name} must be a float64 vector, got {tensor.dtype} {tuple(tensor.shape)}; what "
                "was rounded before cannot be made exact again"
            )


def indices(ids: Tensor, num_embeddings: int, padding_idx: int | None) -> None:
    """Ids must be int32 or int64, ``padding_idx`` one of them."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}; use ids.long()")
    if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must lie in [-{num_embeddings}, {num_embeddings}), got {padding_idx}"
        )


def pairs(**values: tuple[int, int]) -> None:
    """The numbers of a 2-D convolution: two each, at least 1, padding at least 0."""
    for name, value in values.items():
        least = 0 if name == "padding" else 1
        fits_rule = isinstance(value, tuple | list) and len(value) == 2 and min(value) >= least
        if not fits_rule:
            raise ValueError(f"{name} must be two numbers of at least {least}, got {value!r}")


def rank(size: int) -> None:
    """A rank of at least 1."""
    if size < 1:
        raise ValueError(f"the rank must be at least 1, got {size}")


def kernel_rank(size: int) -> None:
    """A rank that the kernels hold in one tile."""
    if size > MAX_RANK:
        raise ValueError(
            f"the kernels take ranks up to {MAX_RANK}, adapters in one call together, got {size}; "
            "use impl='reference', or fewer adapters in a call"
        )


def records(rows: Tensor, n_records: int) -> None:
    wrong = n_records < 0 or len(rows) % max(n_records, 1) != 0
    if wrong or (len(rows) > 0 and n_records == 0) or (len(rows) == 0 and n_records > 0):
        raise ValueError(f"n_records must divide the {len(rows)} rows, got {n_records}")


def per_record(n_records: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (n_records,):
            raise ValueError(
                f"{name} must have one entry for each of the {n_records} records, got "
                f"{tuple(tensor.shape)}"
            )


def one_batch(per_record_grads: list[Tensor]) -> None:
    if len({len(grad) for grad in per_record_grads}) != 1:
        raise ValueError(
            "per_record_grads must hold at least one tensor, all with the same number of records, "
            f"got {[tuple(grad.shape) for grad in per_record_grads]}"
        )


def stream(stream: Tensor) -> None:
    if stream.shape != (12,) or stream.dtype != torch.int32:
        raise TypeError(
            f"stream must be int32 [12]: key, block counter, nonce; got {stream.dtype} "
            f"{tuple(stream.shape)}"
        )


def positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
