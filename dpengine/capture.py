"""Per-record gradients as ordinary autograd gradients of per-record slots.

A slot is a zero tensor [N, *param.shape], expanded from one element, that a layer's Function
receives and ignores in its forward pass; the backward pass returns the per-record gradient for
it. The slots of one forward and backward pass form a set. This module decides when a set opens
and closes and to which batch it belongs, because two batches in one set would let a record move
the sum by twice the bound.

    forward of the root module  -> a set opens, N = rows / K
    backward                    -> the slots receive gradients; the set closes when it ends
    take()                      -> the set leaves, once, to be clipped

With a batch sampler, each set belongs to the batch that the sampler announced last, and the next
one may be announced only after ``take()``: a batch that is skipped cannot pass its place in the
logical batch on to another.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import lora
from .errors import PrivacyError, positive_int

_CAPTURES = WeakTensorKeyDictionary()
"""A weak reference to the Capture that holds the slots of a trainable parameter."""


@dataclass(frozen=True)
class BatchNotice:
    """What a sampler says of a physical batch: its shape, and its place in the logical batch.

    The first ``n_records`` of ``n_slots`` are records, the others padding.
    """

    n_records: int = field(repr=False)
    n_slots: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class RecordGrads:
    """Per-record gradients of one physical batch, in the order of ``Capture.parameters``.

    per_record_grads: [N, *param.shape] each; is_record: bool [N]; ``n_rows`` = N·K rows were in
    the loss; ``is_first`` opens the logical batch and ``is_last`` closes it.
    """

    per_record_grads: list[Tensor] = field(repr=False)
    is_record: Tensor = field(repr=False)
    n_rows: int
    is_first: bool
    is_last: bool


@dataclass
class _SlotSet:
    """The slots of one forward and backward pass; the layers' Functions hold on to it."""

    n_rows: int
    notice: BatchNotice
    slots: dict[Tensor, Tensor] = field(default_factory=dict)
    state: str = "open"  # then "backward", then "closed"

    @property
    def n_slots(self) -> int:
        return self.notice.n_slots

    def slot(self, param: Tensor) -> Tensor | None:
        if not param.requires_grad:
            return None
        if param not in self.slots:
            zero = torch.zeros((), dtype=param.dtype, device=param.device)
            self.slots[param] = zero.expand(self.n_slots, *param.shape).requires_grad_()
        return self.slots[param]

    def on_backward(self) -> None:
        if self.state == "closed":
            raise PrivacyError(
                "backward ran twice through one forward pass; its records would count twice: "
                "sum the losses and call backward once"
            )
        if self.state == "open":
            self.state = "backward"
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def _close(self) -> None:
        self.state = "closed"


class Capture:
    """Takes per-record gradients of every trainable tensor of ``module``, in place.

    The module keeps its class, its files and its `state_dict`; in training mode, with gradients
    enabled, its LoRA layers send per-record gradients to slots and leave ``param.grad`` None.
    Rows of the first tensor argument are ordered ``n * K + k`` with K = ``draws_per_record``.

    Forward passes before one backward() share a set: they must hold the same records in the same
    rows. Only their number can be checked; two different batches would let a record count twice.

    Raises TypeError or ValueError for a trainable tensor without a per-record rule, or for a
    module that mixes the records of a batch.
    """

    def __init__(self, module: nn.Module, *, draws_per_record: int = 1) -> None:
        positive_int(draws_per_record=draws_per_record)
        self.module = module
        self.draws_per_record = draws_per_record
        layers = {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            lora.check_layer(name, layer)
        _refuse_unsound_modules(module)
        self.parameters = _trainable_parameters(module, layers)
        self._set: _SlotSet | None = None
        self._notice: BatchNotice | None = None
        self._has_sampler = False
        self._suspended = False
        self._layers = list(layers.values())
        for name, layer in layers.items():
            layer.forward = MethodType(partial(self._layer_forward, name), layer)
        self._hook = module.register_forward_pre_hook(self._on_root_forward, with_kwargs=True)
        for param in self.parameters:
            _CAPTURES[param] = weakref.ref(self)

    def detach(self) -> None:
        """Give the module back as it was before it was captured."""
        self._hook.remove()
        for layer in self._layers:
            del layer.forward
        for param in self.parameters:
            del _CAPTURES[param]

    def announce(self, notice: BatchNotice) -> None:
        """Tell of the next physical batch. From the first call on, every set needs a notice.

        Raises PrivacyError while the last batch announced has not been taken.
        """
        if self._notice is not None or self._set is not None:
            raise PrivacyError(
                "the sampler's last batch was not used: forward, backward and step() must follow "
                "each batch before the next one; call the optimizer's discard() to give it up"
            )
        self._has_sampler = True
        self._notice = notice

    def reset(self) -> None:
        """Forget the batch under way, as after an exception or an interrupt."""
        self._set = None
        self._notice = None

    def take(self) -> RecordGrads:
        """The per-record gradients of the set that backward has just closed; it leaves for good.

        A tensor that took no part in the forward pass has zero gradients.
        """
        slot_set = self._set
        if slot_set is None or slot_set.state != "closed":
            raise PrivacyError(
                "there are no per-record gradients to take: run one forward pass in training mode "
                "and one backward pass before each step()"
            )
        for param in self.parameters:
            if param.grad is not None:
                raise PrivacyError(
                    "a trainable tensor holds an ordinary gradient, which is not clipped for each "
                    "record: call zero_grad() after each step(), and compute the loss in training "
                    "mode"
                )
        slots = slot_set.slots.values()
        if slots and all(slot.grad is None for slot in slots):
            raise PrivacyError(
                "the backward pass did not reach the per-record slots: call loss.backward(), not "
                "torch.autograd.grad"
            )
        self._set = None
        grads = [_slot_grad(slot_set, param) for param in self.parameters]
        numbers = torch.arange(slot_set.n_slots, device=grads[0].device)
        return RecordGrads(
            per_record_grads=grads,
            is_record=numbers < slot_set.notice.n_records,
            n_rows=slot_set.n_rows,
            is_first=slot_set.notice.is_first,
            is_last=slot_set.notice.is_last,
        )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run PEFT's own forward and ordinary gradients inside the context; for checks only."""
        if self._set is not None:
            raise PrivacyError("capture cannot be suspended while a batch is being processed")
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    def _on_root_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._suspended or not (module.training and torch.is_grad_enabled()):
            return
        n_rows = _n_rows((*args, *kwargs.values()))
        if self._set is None:
            self._set = self._open_set(n_rows)
        elif self._set.state != "open":
            raise PrivacyError(
                "a forward pass began before step() took the gradients of the last one: call "
                "step() after each backward()"
            )
        elif self._set.n_rows != n_rows:
            raise PrivacyError(
                f"forward passes before one backward() must hold the same records, got "
                f"{self._set.n_rows} rows, then {n_rows}"
            )

    def _open_set(self, n_rows: int) -> _SlotSet:
        n_slots, rest = divmod(n_rows, self.draws_per_record)
        if rest or n_slots < 1:
            raise ValueError(
                f"the batch must hold draws_per_record = {self.draws_per_record} rows for each of "
                f"at least one record, got {n_rows} rows; row n * K + k belongs to record n"
            )
        if not self._has_sampler:
            return _SlotSet(n_rows, BatchNotice(n_slots, n_slots, is_first=True, is_last=True))
        notice, self._notice = self._notice, None
        if notice is None:
            raise PrivacyError(
                "a batch came that the sampler did not announce: every batch must come from the "
                "sampler, once"
            )
        if notice.n_slots != n_slots:
            raise PrivacyError(
                f"the sampler announced a batch of {notice.n_slots} records, padding included, "
                f"and one of {n_slots} came"
            )
        return _SlotSet(n_rows, notice)

    def _layer_forward(self, name: str, layer: lora.LoraLinear, x: Tensor, **kwargs: Any) -> Tensor:
        adapter = self._adapter_to_train(name, layer)
        if adapter is None:
            return type(layer).forward(layer, x, **kwargs)
        return lora.forward(layer, adapter, x, self._check_call(name, layer, x, kwargs))

    def _adapter_to_train(self, name: str, layer: lora.LoraLinear) -> str | None:
        if self._suspended or not layer.training:
            return None
        if torch.is_grad_enabled():
            return lora.trainable_adapter(name, layer)
        if self._set is not None and self._set.state == "open":
            raise PrivacyError(
                f"layer {name!r} ran without gradients between the forward and the backward pass "
                "of a batch: use non-reentrant activation checkpointing, and evaluate after step()"
            )
        return None

    def _check_call(
        self, name: str, layer: lora.LoraLinear, x: Tensor, kwargs: dict[str, Any]
    ) -> _SlotSet:
        if not any(layer is captured for captured in self._layers):
            raise PrivacyError(
                f"layer {name!r} belongs to a copy of the captured module; make copies for "
                "training before Capture, and capture each"
            )
        if kwargs:
            raise ValueError(
                f"layer {name!r} got {sorted(kwargs)}; mixed adapters in one batch have no "
                "per-record rule: train one adapter at a time"
            )
        slot_set = self._set
        if slot_set is None or slot_set.state == "closed":
            raise PrivacyError(
                f"layer {name!r} ran outside a forward pass of the captured module, which alone "
                "tells how many records there are: call the module that was given to Capture"
            )
        if len(x) != slot_set.n_rows:
            raise PrivacyError(
                f"layer {name!r} got {len(x)} rows of a batch of {slot_set.n_rows}: its input must "
                "keep one row for each row of the batch"
            )
        return slot_set


def find(params: list[Tensor]) -> Capture:
    """The Capture that holds the slots of exactly ``params``."""
    references = {_CAPTURES.get(param) for param in params}
    reference = references.pop() if len(references) == 1 else None
    capture = reference() if reference is not None else None
    if capture is None:
        raise ValueError(
            "the optimizer's parameters must all be captured by one Capture; call "
            "Capture(module) before making the optimizer private"
        )
    if {id(p) for p in params} != {id(p) for p in capture.parameters}:
        raise ValueError(
            "the optimizer must hold every trainable tensor of the captured module and no other: "
            "give it capture.parameters"
        )
    return capture


def _n_rows(arguments: tuple) -> int:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.ndim > 0:
            return len(argument)
    raise ValueError("the captured module was called without a tensor whose rows can be counted")


def _slot_grad(slot_set: _SlotSet, param: Tensor) -> Tensor:
    slot = slot_set.slots.get(param)
    if slot is None or slot.grad is None:
        return param.new_zeros(slot_set.n_slots, *param.shape)
    return slot.grad


def _trainable_parameters(module: nn.Module, layers: dict[str, nn.Module]) -> list[nn.Parameter]:
    covered = {
        id(factor.weight)
        for layer in layers.values()
        for factors in (layer.lora_A, layer.lora_B)
        for factor in factors.values()
    }
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    uncovered = [name for name, param in trainable.items() if id(param) not in covered]
    if uncovered:
        raise ValueError(
            f"{len(uncovered)} trainable tensors have no per-record rule, the first is "
            f"{uncovered[0]!r}; freeze them with requires_grad_(False)"
        )
    if not trainable:
        raise ValueError("the module has no trainable tensor; add a LoRA adapter first")
    for name, param in trainable.items():
        if param.dtype != torch.float32:
            raise TypeError(
                f"trainable tensor {name!r} must be float32, got {param.dtype}; cast the adapter "
                "with diffusers.training_utils.cast_training_params(module)"
            )
        if param in _CAPTURES and _CAPTURES[param]() is not None:
            raise ValueError(f"trainable tensor {name!r} is captured already, by another Capture")
    return list(trainable.values())


def _refuse_unsound_modules(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            raise ValueError(
                f"module {name!r} has dropout {child.p}, drawn from a generator that is not "
                "secret; set its p to 0"
            )
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"module {name!r} is a {type(child).__name__}, which mixes the records of a batch; "
                "replace it by GroupNorm"
            )
