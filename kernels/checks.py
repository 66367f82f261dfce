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


def rank(size: int) -> None:
    if not 1 <= size <= MAX_RANK:
        raise ValueError(
            f"the rank must lie between 1 and {MAX_RANK}, adapters in one call taken together, "
            f"got {size}"
        )


def records(rows: Tensor, n_records: int) -> None:
    if n_records < 0 or len(rows) % max(n_records, 1) or (len(rows) > 0) != (n_records > 0):
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
