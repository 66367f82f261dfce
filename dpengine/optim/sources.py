"""Where an optimizer's per-record gradients come from."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..capture import Capture, wiring
from ..capture.slots import Layout, SeparateGrads
from ..errors import PrivacyError
from ..mechanism.batches import RecordGrads


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


Source = Capture | GradSamples


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """The trainable tensors of all groups."""
    groups = optimizer.param_groups
    return [param for group in groups for param in group["params"] if param.requires_grad]


def find(params: list[Tensor]) -> Source:
    """The source of all of ``params``: their ``Capture``, or their `grad_sample`.

    Raises ValueError where there is neither, or both, or not one for all of them.
    """
    if not params:
        raise ValueError("the optimizer holds no trainable tensor; give it the adapter's")
    sampled = [hasattr(param, "grad_sample") for param in params]
    captured = wiring.of(params)
    if any(sampled) and any(wiring.of([param]) for param in params):
        raise ValueError(
            "parameters are captured and hold a grad_sample of Opacus' GradSampleModule as well: "
            "leave that module out, or its to_standard_module() after it, or call the capture's "
            "detach()"
        )
    if all(sampled):
        return GradSamples(params)
    if captured is None:
        raise ValueError(
            "the optimizer's trainable parameters must all be captured by one Capture, or all "
            "belong to Opacus' GradSampleModule; call Capture(module) or make_private before, and "
            "give the optimizer no tensor that was added since"
        )
    return captured


def check_complete(source: Source, params: list[Tensor]) -> None:
    """Raise ValueError unless ``params`` are all that ``source`` takes gradients of."""
    if {id(param) for param in params} != {id(param) for param in source.parameters}:
        raise ValueError(
            "the optimizer must hold every trainable tensor of the captured module: give it "
            "capture.parameters, add the others by add_param_group, or freeze them before Capture"
        )


def same(one: Source, other: Source | None) -> bool:
    """Whether both give the gradients of one batch under way."""
    if isinstance(one, GradSamples) and isinstance(other, GradSamples):
        return list(map(id, one.parameters)) == list(map(id, other.parameters))
    return one is other


def public_grads(source: Source, loss: Callable[[], Tensor] | None) -> list[Tensor | float]:
    """Ordinary gradients of a loss of public rows, for each tensor of ``source``; 0. if unused.

    None as ``loss`` has none.

    Draws of torch's generators within ``loss`` come from a fresh state, which is forgotten: the
    place of theirs tells how much the private rows have drawn.
    """
    if loss is None:
        return []
    if not isinstance(source, Capture):
        raise PrivacyError(
            "a public loss needs a module that is captured: Opacus' GradSampleModule would take "
            "its rows for records; call Capture(module) or make_private"
        )
    devices = {p.device for p in source.parameters if p.device.type == "cuda"}
    with source.suspended(), torch.enable_grad(), torch.random.fork_rng(list(devices)):
        torch.seed()
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise TypeError("a public loss must be a tensor of one number, made by the module")
        grads = torch.autograd.grad(value, source.parameters, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(
            "the public loss depends on no trained tensor: attach one that calls the module of "
            "this optimizer, to a copy another one"
        )
    return [0.0 if grad is None else grad for grad in grads]


def _passes(param: Tensor) -> list[Tensor]:
    grads = param.grad_sample
    if grads is None:
        return []
    return grads if isinstance(grads, list) else [grads]


def _stored(grads: Tensor) -> Tensor:
    """In a type that clipping reads; rounding comes before the norm."""
    return grads if grads.dtype in (torch.float32, torch.bfloat16) else grads.float()
