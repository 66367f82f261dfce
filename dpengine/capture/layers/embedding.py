"""The per-record rule of an embedding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .rule import SlotSet, as_written


class EmbeddingFunction(torch.autograd.Function):
    """``y = W[ids]`` with ``grad[n, v] = Σ_{t: ids[n,t] = v} g[n,t]``.

    ids [N·K, ...] -> [N·K, ..., D].
    """

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, slot_set: SlotSet
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx, ctx.slot_set = weight, padding_idx, slot_set
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[None, ...]:
        slot_set, weight = ctx.slot_set, ctx.weight
        slot_set.on_backward()
        (ids,) = ctx.saved_tensors
        with as_written(backprops):
            grads = ops.embedding_per_record_grads(
                ids,
                backprops,
                num_embeddings=len(weight),
                n_records=slot_set.n_slots,
                padding_idx=ctx.padding_idx,
                out=slot_set.view(weight),
                impl=slot_set.impl,
            )
        slot_set.record(weight, grads)
        return None, None, None, None


def covers(layer: nn.Embedding | nn.EmbeddingBag) -> bool:
    """Whether the rule holds for an embedding as it is configured."""
    # Both of these make a record's output or gradient depend on the ids of the others.
    return layer.max_norm is None and not layer.scale_grad_by_freq


def check_bags(
    name: str,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> None:
    """Raise ValueError unless an EmbeddingBag is given one row of ids for each bag."""
    if input.ndim != 2 or offsets is not None:
        raise ValueError(
            f"embedding bag {name!r} is given the ids of all bags one after another, of which none "
            "can be told whose they are: give ids [rows, L], one row for each row of the batch, "
            "with padding_idx set and short bags filled with it"
        )


def forward(layer: nn.Embedding, slot_set: SlotSet, ids: Tensor) -> Tensor:
    """The layer's forward pass, the gradients of its rows kept apart by record."""
    return EmbeddingFunction.apply(ids, layer.weight, layer.padding_idx, slot_set)
