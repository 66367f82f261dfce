"""Per-record gradients that Opacus' ``GradSampleModule`` has left in ``param.grad_sample``."""

import torch
from torch import Tensor

from .errors import PrivacyError
from .record_grads import RecordGrads
from .slab import Layout, SeparateGrads


class GradSamples:
    """Takes the per-record gradients of ``params`` from their `grad_sample`, as ``Capture`` does.

    `grad_sample` is [N, *param.shape], or a list of such from several backward passes. Its module
    has undone a mean over rows already. Each gradient is taken once: `grad_sample` and the ordinary
    gradient beside it are None afterwards.
    """

    draws_per_record = 1
    n_rows = 1
    will_go_on = False

    def __init__(self, params: list[Tensor]) -> None:
        self.parameters = params
        self.current_pass = 0

    def begin_pass(self) -> int:
        """A loader begins anew. The number of its pass, the one that counts from now on."""
        self.current_pass += 1
        return self.current_pass

    @property
    def n_waiting(self) -> int:
        """How many backward passes have gradients that ``take`` has not had."""
        return max(len(_passes(param)) for param in self.parameters)

    @property
    def per_record_grads(self) -> list[Tensor]:
        """Those that ``take`` would give, zeros for a tensor that was not used.

        Raises PrivacyError where there are none, and where the tensors hold those of different
        records.
        """
        passes = {id(param): _passes(param) for param in self.parameters}
        used = [grads for grads in passes.values() if grads]
        if not used:
            raise PrivacyError(
                "there are no per-record gradients to take: run one forward and one backward pass "
                "through Opacus' GradSampleModule before each step()"
            )
        sizes = [len(grads) for grads in used[0]]
        if any([len(grads) for grads in tensor] != sizes for tensor in used):
            raise PrivacyError(
                "the tensors hold gradients of different records: call step() after each backward "
                "pass, and use each layer once in a forward pass"
            )
        n_records = sum(sizes)
        return [
            torch.cat([_stored(grads) for grads in passes[id(param)]])
            if passes[id(param)]
            else param.new_zeros(n_records, *param.shape)
            for param in self.parameters
        ]

    def take(self) -> RecordGrads:
        """The per-record gradients of all backward passes since the last call."""
        per_record_grads, n_passes = self.per_record_grads, self.n_waiting
        is_coarse = any(g.dtype.itemsize < 4 for p in self.parameters for g in _passes(p))
        self.drop()
        n_records = len(per_record_grads[0])
        if n_records == 0:  # a Poisson batch without records: one slot of padding
            per_record_grads = [grads.new_zeros(1, *grads.shape[1:]) for grads in per_record_grads]
        n_slots, device = max(n_records, 1), per_record_grads[0].device
        layout = Layout(
            tuple(self.parameters), tuple(range(len(self.parameters))), per_record_grads[0].dtype
        )
        grads = SeparateGrads(layout, n_slots)
        for param, of_param in zip(self.parameters, per_record_grads, strict=True):
            grads.record(param, of_param)
        return RecordGrads(
            grads=grads,
            is_record=torch.arange(n_slots, device=device) < n_records,
            n_rows=1,
            is_first=False,
            is_last=None,
            n_passes=n_passes,
            is_coarse=is_coarse,
        )

    def drop(self) -> bool:
        """Give up what ``take`` has not had; say whether there was any."""
        is_waiting = self.n_waiting > 0
        for param in self.parameters:
            param.grad_sample = param.grad = None
        return is_waiting

    reset = drop


def _passes(param: Tensor) -> list[Tensor]:
    grads = param.grad_sample
    if grads is None:
        return []
    return grads if isinstance(grads, list) else [grads]


def _stored(grads: Tensor) -> Tensor:
    """In a type that clipping reads; rounding comes before the norm."""
    return grads if grads.dtype in (torch.float32, torch.bfloat16) else grads.float()
