"""Where an optimizer's per-record gradients come from."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import capture
from .capture import Capture
from .errors import PrivacyError
from .grad_samples import GradSamples

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
    captured = capture.of(params)
    if any(sampled) and any(capture.of([param]) for param in params):
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
