"""Any other module with trainable tensors: its per-record gradients by vmap over `torch.func`.

The module runs as it is, once forward, and once more for each record in the backward pass, all
records side by side under vmap. It must treat each record's rows on their own, and take and return
its tensors with the rows first; they may stand in tuples, lists and dicts, or one by one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .rule import SlotSet


class FallbackFunction(torch.autograd.Function):
    """``call(params, *leaves)``, the gradients of the parameters kept apart by record.

    The arguments that ``by_record`` tells of have N·K rows and are cut into records, all others are
    shared by them. Returns the leaves of the output, and their structure as the last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Any],
        params: dict[str, Tensor],
        slot_set: SlotSet,
        n_rows: int,
        by_record: list[bool],
        *leaves: Any,
    ) -> tuple[Any, ...]:
        # The last of the leaves are the parameters again, so that the output has a gradient.
        ctx.call, ctx.params, ctx.slot_set = call, params, slot_set
        leaves = leaves[: len(leaves) - len(params)]
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.by_record = by_record
        ctx.device = device = next(iter(params.values())).device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = partial(torch.autocast, device, dtype, enabled)
        outputs, structure = call(params, *leaves)
        _check_outputs(outputs, n_rows)
        ctx.differentiable = [_is_differentiable(output) for output in outputs]
        return *outputs, structure

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor | None) -> tuple[Tensor | None, ...]:
        slot_set = ctx.slot_set
        slot_set.on_backward()
        n_slots, by_record = slot_set.n_slots, ctx.by_record
        leaves = [
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[5 : 5 + len(leaves)]) if need]

        def of_one_record(own: list[Tensor], backprops: list[Tensor]) -> tuple[dict, tuple]:
            pieces = iter(own)
            mine = [
                next(pieces) if rows else leaf for leaf, rows in zip(leaves, by_record, strict=True)
            ]

            def run(params: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
                arguments = list(mine)
                for i, value in zip(wanted, inputs, strict=True):
                    arguments[i] = value
                outputs, _ = ctx.call(params, *arguments)
                return tuple(compress(outputs, ctx.differentiable))

            _, pull_back = vjp(run, ctx.params, *(mine[i] for i in wanted))
            grads, *input_grads = pull_back(tuple(backprops))
            return grads, tuple(input_grads)

        own = [
            leaf.unflatten(0, (n_slots, -1))
            for leaf, rows in zip(leaves, by_record, strict=True)
            if rows
        ]
        with ctx.autocast(), _kernels_under_vmap(ctx.device):
            grads, input_grads = vmap(of_one_record)(
                own,
                [
                    grad.unflatten(0, (n_slots, -1))
                    for grad in compress(backprops, ctx.differentiable)
                ],
            )
        for name, param in ctx.params.items():
            out = slot_set.view(param)
            # A copy: it may be a view of backprops, or of one row for all records.
            slot_set.record(param, grads[name].clone() if out is None else out.copy_(grads[name]))
        inputs: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(wanted, input_grads, strict=True):
            inputs[i] = grad.flatten(0, 1) if by_record[i] else grad.sum(0)
        return None, None, None, None, None, *inputs, *(None,) * len(ctx.params)


class _OwnForward(nn.Module):
    """Calls a module's own forward, which a capture has put another in front of, without hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def forward(
    module: nn.Module,
    slot_set: SlotSet,
    n_rows: int,
    shared: dict[tuple[TreeSpec, int], int | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The module's forward pass, the gradients of all trainable tensors under it kept apart.

    shared: what ``_by_record`` has learned of the arguments in earlier batches of other sizes.

    Raises TypeError or ValueError for an output that is not made of tensors with N·K rows, and
    ValueError for an argument of which it is not known whether it has rows.
    """
    own_forward = _OwnForward(module)
    params = {name: p for name, p in own_forward.named_parameters() if p.requires_grad}
    leaves, structure = tree_flatten((args, kwargs))
    by_record = _by_record(leaves, structure, n_rows, slot_set.n_slots, shared)

    def call(params: dict[str, Tensor], *leaves: Any) -> tuple[list[Any], TreeSpec]:
        args, kwargs = tree_unflatten(list(leaves), structure)
        return tree_flatten(functional_call(own_forward, params, args, kwargs))

    *outputs, structure_of_output = FallbackFunction.apply(
        call, params, slot_set, n_rows, by_record, *leaves, *params.values()
    )
    return tree_unflatten(outputs, structure_of_output)


def _kernels_under_vmap(device: str) -> AbstractContextManager[None]:
    # The fused attention of a CPU has no batching rule, and would run record by record.
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _by_record(
    leaves: list[Any],
    structure: TreeSpec,
    n_rows: int,
    n_slots: int,
    shared: dict[tuple[TreeSpec, int], int | None],
) -> list[bool]:
    """Which arguments have a row for each row of the batch.

    Length alone cannot tell: a table that all records share is as long as some batch. What had
    another length than a batch once is shared, and stays so; ``shared`` keeps its length, and None
    for what had rows. What was taken for either and proves to be the other is refused, so an error
    in the first batch does not outlive the second size (a look at two sizes comes before both).
    With one record both readings are the same, and nothing is learned.
    """
    by_record = []
    for place, leaf in enumerate(leaves):
        has_rows = _has_rows(leaf, n_rows)
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and n_slots > 1:
            length = shared.setdefault((structure, place), None if has_rows else len(leaf))
            if has_rows and length == n_rows:
                has_rows = False
            elif has_rows != (length is None):
                raise ValueError(
                    "a module without a per-record rule of its own was given a tensor with one row "
                    "for each row of the batch in one call and of another length in another, in "
                    "the same place: expand what all records share, such as learned queries and "
                    "positions, to the rows of the batch"
                )
        by_record.append(has_rows)
    return by_record


def _has_rows(leaf: Any, n_rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == n_rows


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _check_outputs(outputs: list[Any], n_rows: int) -> None:
    for output in outputs:
        if not isinstance(output, Tensor | int | float | str | None):
            raise TypeError(
                "a module without a per-record rule of its own must return tensors, or tuples, "
                f"lists and dicts of them, got a {type(output).__name__}: freeze it, or return "
                "these"
            )
        if _is_differentiable(output) and not _has_rows(output, n_rows):
            raise ValueError(
                "a module without a per-record rule of its own must return tensors with one row "
                "for each row of the batch, and gave an output of another length: freeze it, or "
                "keep the rows apart"
            )
