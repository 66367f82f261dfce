"""Per-record gradients of a module's trainable tensors, taken in its ordinary backward pass.

Each trained layer runs by a rule (``layers``) that keeps the gradients of every record apart
(``slab``) and leaves ``param.grad`` None. The slots of one forward and backward pass form a set.
This module decides when a set opens and closes and to which batch it belongs, because two batches
in one set would let a record move the sum by twice the bound.

    forward of the root module  -> a set opens, N = rows / K
    backward                    -> the rules give their gradients; the set closes when it ends
    take()                      -> the set leaves, once, to be clipped

With a batch sampler, the i-th set belongs to the i-th batch that it announced (``announcements``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import PrivacyError, positive_int
from ..kernels.ops import Impl
from ..mechanism.batches import BatchNotice, PerRecordGrads, RecordGrads
from ..mechanism.private import Private
from . import precision, soundness, wiring
from .announcements import Announcements
from .layers import TrainedLayer, trained_layers
from .slots import BatchSlots, Layout, SeparateGrads, Slab
from .soundness import check_dtype, count_rows, trainable_parameters
from .watch import Watch
from .wiring import Hook, Rerouted

Loss = Callable[..., Tensor]
"""From the tensors of a physical batch, the rows of the captured module's input first, to a
scalar. It must be a pure function of them and of the weights, and draw nothing at random."""

Pass = Callable[..., None]
"""Takes the arguments of a ``Loss`` and leaves per-record gradients to ``Capture.take``."""


class Capture:
    """Takes per-record gradients of every trainable tensor of ``module``, in place.

    The module keeps its class, its files and its `state_dict`; in training mode, with gradients
    enabled, its trained layers keep per-record gradients apart and leave ``param.grad`` None.
    Rows of the first tensor argument are ordered ``n * K + k`` with K = ``draws_per_record``.

    dtype: that of the gradients kept, float32, or bfloat16 for half the memory. They are rounded to
    it before their norm is taken, so the bound on a record's contribution is the same; a mean over
    a private number of rows is refused with it.

    norm_only: keep the activations and backprops of linear layers whose own weight is trained, not
    a gradient for each record: less memory where a matrix is larger than they are, at twice the
    work. Such a layer may be used once in a forward pass; ``per_record_grads`` multiplies it out.

    impl: how the rules of the layers compute, as in ``kernels.ops``: `auto`, or `reference` or
    `triton` everywhere.

    Forward passes before one backward() share a set: they must hold the same records in the same
    rows. Only their number can be checked; two different batches would let a record count twice.
    A copy of the module is not captured.

    Raises TypeError or ValueError for a trainable tensor without a per-record rule, and for modules
    known to mix the records of a batch, such as BatchNorm. Whether the model as a whole keeps them
    apart can only be seen by running it: ``check_per_record_grads`` does so on synthetic rows.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        draws_per_record: int = 1,
        dtype: torch.dtype = torch.float32,
        norm_only: bool = False,
        impl: Impl = "auto",
    ) -> None:
        positive_int(draws_per_record=draws_per_record)
        if impl not in get_args(Impl):
            raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"dtype must be float32 or bfloat16, got {dtype}")
        self.module = module
        self.draws_per_record = draws_per_record
        soundness.refuse_unsound_modules(module)
        self._layers = trained_layers(module)
        trainable, owners = trainable_parameters(module, self._layers)
        self.parameters = list(trainable.values())
        for name, param in trainable.items():
            if wiring.of([param]) is not None:
                raise ValueError(
                    f"trainable tensor {name!r} is captured already; call that Capture's detach() "
                    "first"
                )
        self.layout = Layout(tuple(self.parameters), tuple(owners), dtype)
        self._norm_only, self._impl = norm_only, impl
        self._devices = [param.device for param in self.parameters]
        self._slab: Slab | None = None
        self._set: BatchSlots | None = None
        self.watch = Watch(module)
        self.announcements = Announcements(is_idle=lambda: self._set is None)
        self._suspended = False
        captured = set(self.parameters)
        self._frozen = [param for param in module.parameters() if param not in captured]
        # What was added since shows in these, at a tenth of the cost of a walk over the module.
        children = [(child._modules, child._parameters) for child in module.modules()]
        self._owned = [(of, list(of.values()), params, len(params)) for of, params in children]
        self.attach()

    def attach(self) -> None:
        """Take the module again, as it was before ``detach``."""
        for layer in self._layers:
            layer.module.forward = Rerouted(layer.module, partial(self._layer_forward, layer))
        hooks = (
            self.module.register_forward_pre_hook(Hook(self._on_root_forward), with_kwargs=True),
            self.module.register_forward_hook(Hook(self._after_root_forward)),
            self.module.register_state_dict_pre_hook(Hook(self._before_state_dict)),
        )
        self._undo = [hook.remove for hook in hooks]
        wiring.hold(self.parameters, self)

    def at_detach(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` when the module is given back."""
        self._undo.append(undo)

    def detach(self) -> None:
        """Give the module back as it was; a second call does nothing."""
        if not self._undo:
            return
        while self._undo:
            self._undo.pop()()
        for layer in self._layers:
            del layer.module.forward
        wiring.give_up(self.parameters)

    cleanup = detach
    """Opacus' name of it."""

    def disable_hooks(self) -> None:
        """Run the module with ordinary gradients, which no ``DPOptimizer`` applies."""
        self._suspend(True)

    def enable_hooks(self) -> None:
        """Take per-record gradients again, after ``disable_hooks``."""
        self._suspend(False)

    def drop(self) -> bool:
        """Give up the last backward pass, whole or not, if ``take`` has not had it; say whether."""
        if self._set is None or self._set.state == "open":
            return False
        self._set.state = "closed"
        self._set = None
        return True

    def reset(self) -> None:
        """Forget the batch under way and those announced, as after an exception or interrupt."""
        if self._set is not None:
            self._set.state = "closed"
        self._set = None
        self.announcements.clear()

    @property
    def layers(self) -> tuple[TrainedLayer, ...]:
        """The layers with trained tensors."""
        return tuple(self._layers)

    @property
    def will_go_on(self) -> bool:
        """Whether the logical batch goes on after the one at work, as its sampler has told."""
        return self._set is not None and self._set.notice.is_last is False

    @property
    def n_waiting(self) -> int:
        """How many backward passes have gradients that ``take`` has not had: one, or none."""
        return int(self._set is not None and self._set.state == "closed")

    @property
    def per_record_grads(self) -> list[Tensor]:
        """Those that ``take`` would give.  [N, *param.shape] each"""
        return self._closed_set().grads.by_param

    @property
    def n_rows(self) -> int:
        """The rows that they come from."""
        return self._closed_set().n_rows

    def take(self) -> RecordGrads:
        """The per-record gradients of the set that backward has just closed; it leaves for good.

        A tensor that took no part in the forward pass has zero gradients.
        """
        slot_set = self._closed_set()
        if (
            any(
                list(modules.values()) != before or len(params) != n_params
                for modules, before, params, n_params in self._owned
            )
            or any(param.requires_grad for param in self._frozen)
            or not all(param.requires_grad for param in self.parameters)
        ):
            raise PrivacyError(
                "layers or tensors were added, replaced, frozen or made trainable since the module "
                "was captured; call the capture's detach() and capture the module again"
            )
        for param in self.parameters:
            if param.grad is not None:
                raise PrivacyError(
                    "a trainable tensor holds an ordinary gradient, not clipped for each record: "
                    "call zero_grad(), train in training mode, use it in its own layer alone, and "
                    "take a penalty on parameters out of the loss (weight_decay is the optimizer's)"
                )
        self._set = None
        grads, slot_set.grads = slot_set.grads, None  # a loss still held must not keep them alive
        numbers = torch.arange(slot_set.n_slots, device=self.parameters[0].device)
        return RecordGrads(
            grads=grads,
            is_record=numbers < slot_set.notice.n_records.reveal(),
            n_rows=slot_set.n_rows,
            is_first=slot_set.notice.is_first,
            is_last=slot_set.notice.is_last,
            charged=slot_set.notice.charged,
            logical=slot_set.notice.logical,
            is_coarse=not slot_set.notice.is_public and slot_set.is_coarse,
        )

    def _closed_set(self) -> BatchSlots:
        if self._set is None or self._set.state != "closed":
            if not self.module.training:
                raise PrivacyError(
                    "the module is in eval mode, in which no per-record gradients are taken: call "
                    "its train() before the loop, and eval() on what must not be trained through"
                )
            raise PrivacyError(
                "there are no per-record gradients to take: run one forward pass in training mode "
                "and one backward pass before each step()"
            )
        return self._set

    def as_function(self, loss: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        """Forward and backward pass of ``loss`` as a function to the per-record gradients.

        For tracing: from the same inputs, the rows first, it returns those of ``take`` in the order
        of ``parameters``, belongs to no batch, and keeps nothing.
        """

        def run(*inputs: Tensor) -> list[Tensor]:
            if self._set is not None:
                raise PrivacyError("a pass cannot be recorded while a batch is being processed")
            n_slots = self._n_slots(len(inputs[0]))
            # A recorded pass takes inputs of one shape.
            notice = BatchNotice(
                Private(n_slots), n_slots, is_first=True, is_last=True, is_public=True
            )
            self._set = slot_set = BatchSlots(
                len(inputs[0]), notice, self._holder(n_slots), self._impl
            )
            try:
                loss(*inputs).backward()
            finally:
                self._set = None
            if slot_set.state != "closed":
                raise PrivacyError("run the module in training mode, with gradients enabled")
            return slot_set.grads.by_param

        return run

    @property
    def configuration(self) -> tuple:
        """What a recorded pass has taken in: the mode, and the adapters that run and how."""
        return self.module.training, tuple(layer.configuration for layer in self._layers)

    def replay(self, n_rows: int, run: Callable[[], list[Tensor]]) -> None:
        """A set whose forward and backward pass is ``run()``, recorded from ``as_function``."""
        if self._set is not None:
            raise PrivacyError("a recorded pass began before step() took the last gradients")
        self._set = self._open_set(n_rows)
        self._set.notice = replace(self._set.notice, is_public=True)  # inputs have one shape
        self._set.on_replay(self.layout.params, run())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run PEFT's own forward and ordinary gradients inside the context; for checks only."""
        before = self._suspended
        self._suspend(True)
        try:
            yield
        finally:
            self._suspended = before

    def _suspend(self, suspended: bool) -> None:
        if self._set is not None:
            raise PrivacyError("capture cannot be suspended while a batch is being processed")
        self._suspended = suspended

    def _on_root_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.takes_gradients:
            return
        n_rows = count_rows((*args, *kwargs.values()))
        if self._set is None:
            self._set = self._open_set(n_rows)
        elif self._set.state != "open":
            raise PrivacyError(
                "a forward pass began before step() took the gradients of the last one: call "
                "step() after each backward(), or zero_grad() after one that failed"
            )
        elif self._set.n_rows != n_rows:
            raise PrivacyError(
                "forward passes before one backward() must hold the same records, got other "
                "numbers of rows"
            )
        self.watch.begin()

    def _after_root_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.takes_gradients:
            self.watch.check()
            self._note_precision(output)

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.watch.check_leaving()

    def _note_precision(self, output: Any) -> None:
        if self._set is not None and not self._set.notice.is_public:
            like, n_rows = self.parameters[0], self._set.n_rows
            precision.note_rounding(output, like, n_rows, self._set.note_rounding)

    @property
    def takes_gradients(self) -> bool:
        """Whether a forward pass now begins one of a batch, or goes on with it."""
        return not self._suspended and self.module.training and torch.is_grad_enabled()

    def _open_set(self, n_rows: int) -> BatchSlots:
        n_slots = self._n_slots(n_rows)
        for param, device in zip(self.parameters, self._devices, strict=True):
            check_dtype(f"of shape {tuple(param.shape)}", param)
            if param.device != device:
                raise PrivacyError(
                    f"the module was moved from {device} to {param.device} since it was captured; "
                    "move it before Capture or make_private, and before the optimizer is made"
                )
        notice = self.announcements.next(n_slots)
        is_coarse = self.layout.dtype.itemsize < 4
        return BatchSlots(n_rows, notice, self._holder(n_slots), self._impl, is_coarse=is_coarse)

    def _n_slots(self, n_rows: int) -> int:
        n_slots, rest = divmod(n_rows, self.draws_per_record)
        if rest or n_slots < 1:
            raise ValueError(
                f"the batch must hold draws_per_record = {self.draws_per_record} rows for each "
                "record, row n * K + k for record n; rows of public images, as for prior "
                "preservation, must not be in it: give their loss to the optimizer's "
                "attach_public_loss"
            )
        return n_slots

    def _holder(self, n_slots: int) -> PerRecordGrads:
        if self._norm_only or self.parameters[0].device.type == "cpu":
            return SeparateGrads(self.layout, n_slots, norm_only=self._norm_only)
        if self._slab is None or len(self._slab.values) != n_slots:
            self._slab = None  # free the old one first
            self._slab = Slab(self.layout, n_slots)
        self._slab.begin()
        return self._slab

    def _layer_forward(self, layer: TrainedLayer, *args: Any, **kwargs: Any) -> Any:
        module = layer.module
        if self._suspended or not module.training:
            return type(module).forward(module, *args, **kwargs)
        if not torch.is_grad_enabled():
            self._check_no_open_set(layer.name)
            return type(module).forward(module, *args, **kwargs)
        if not layer.is_active():
            return type(module).forward(module, *args, **kwargs)
        layer.check_arguments(*args, **kwargs)
        slot_set = self._check_call(layer.name, (*args, *kwargs.values()))
        if precision.autocast_is_on(self.parameters[0]):
            slot_set.note_rounding(True)  # a rule may cast within
        return layer.forward(slot_set, slot_set.n_rows, *args, **kwargs)

    def _check_no_open_set(self, name: str) -> None:
        if self._set is not None and self._set.state == "open":
            raise PrivacyError(
                f"layer {name!r} ran without gradients between the forward and the backward pass "
                "of a batch: use non-reentrant activation checkpointing, and evaluate after step()"
            )

    def _check_call(self, name: str, arguments: tuple) -> BatchSlots:
        slot_set = self._set
        if slot_set is None or slot_set.state == "closed":
            raise PrivacyError(
                f"layer {name!r} ran outside a forward pass of the captured module, which alone "
                "tells how many records there are: call the module that was given to Capture"
            )
        n_rows = count_rows(arguments)
        if n_rows != slot_set.n_rows:
            raise PrivacyError(
                f"layer {name!r} must be given one row for each row of the batch, along the first "
                "axis of its first tensor; expand what rows share, as position_ids of [1, T]"
            )
        return slot_set
