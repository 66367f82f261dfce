"""What a step does, counted: the same on every machine."""

from collections import Counter
from collections.abc import Callable
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


class OpCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches below autograd, without views.

    Every call of an operator is one, a fused or `foreach` one as well; those that a composite
    operator is made of count, itself not. A view returns an alias of an argument that it did not
    write to, by its schema; `_unsafe_view` is one that hides the alias. The profiler's marks around
    an optimizer's step are no operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        hidden_view = func is torch.ops.aten._unsafe_view.default
        if not (is_view or hidden_view or func.namespace == "profiler"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_ops(run: Callable[[], object]) -> int:
    """Operators of ``run()`` that are no views."""
    with OpCounter() as counter:
        run()
    return counter.counts.total()


def _product(_, left, right, **options) -> int:
    return 2 * prod(left) * right[-1]


def _attention(query, key, value, *options, **more) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *options, **more) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_aten = torch.ops.aten
_UNKNOWN_TO_TORCH = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""From shapes, what torch's counter leaves out: products in place, and a CPU's attention."""


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of ``run()``, from shapes.

    Of matrix products, convolutions and attention; kernels that torch does not know are not seen.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        run()
    return counter.get_total_flops()
