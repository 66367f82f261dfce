"""Checks before training that no trainable tensor is missed and no record touches another.

They run on synthetic rows only, so what they find is public.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .capture import Capture
from .errors import PrivacyError

Losses = Callable[[slice | Tensor], Tensor]
"""One loss per row for a choice of fixed synthetic rows, a whole number of records."""

_ZERO = 1e-6
_TOLERANCE = 1e-3


def freeze_inert_tensors(module: nn.Module, losses: Losses) -> list[str]:
    """Freeze each trainable tensor whose gradient is zero everywhere, and return their names.

    Query and key of an attention over a single token are the common case: the softmax over one
    value is constant. Such tensors cannot learn; noise in them would be noise for nothing.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with _moved_off_init(list(named.values())):
        grads = torch.autograd.grad(
            losses(slice(None)).mean(), list(named.values()), allow_unused=True
        )
    total = _norm([grad for grad in grads if grad is not None])
    inert = [
        name
        for name, grad in zip(named, grads, strict=True)
        if grad is None or grad.double().norm() <= _ZERO * total
    ]
    for name in inert:
        named[name].requires_grad_(False)
    return inert


def check_per_record_grads(capture: Capture, losses: Losses, n_records: int) -> None:
    """Raise PrivacyError unless every tensor's per-record gradient is that of its record alone.

    Compares the captured gradients of one batch of ``n_records`` synthetic records, tensor by
    tensor and record by record, with ordinary backward passes over single records through PEFT's
    own forward. A mixing of records, a missed use of a tensor or a wrong rule shows as a
    difference.
    """
    draws = capture.draws_per_record
    with _moved_off_init(capture.parameters):
        losses(slice(None)).mean().backward()
        batch = capture.take()
        captured = [n_records * grads.double() for grads in batch.per_record_grads]
        alone = []
        with capture.suspended():
            for n in range(n_records):
                loss = losses(slice(n * draws, (n + 1) * draws)).mean()
                alone.append(torch.autograd.grad(loss, capture.parameters))
    total = torch.stack([torch.tensor(_norm(grads)) for grads in alone])  # [N]
    for index, name in enumerate(_names(capture)):
        expected = torch.stack([grads[index].double() for grads in alone])
        error = (captured[index] - expected).flatten(1).norm(dim=1)
        if not (error <= _TOLERANCE * expected.flatten(1).norm(dim=1) + _ZERO * total).all():
            raise PrivacyError(
                f"the per-record gradient of {name!r} differs from that of its record alone; the "
                "model mixes the records of a batch, or uses this tensor where its rule does not "
                "see it: freeze it, or replace the module that mixes records"
            )


def check_slots(capture: Capture, losses: Losses, n_records: int) -> None:
    """Raise ValueError unless a record's gradient has the same bits in every slot of a batch.

    ``losses`` gives ``n_records`` synthetic records, a physical batch of the shape that will be
    used. Otherwise a record would move the rounding of those that come after it.
    """
    draws = capture.draws_per_record
    with _moved_off_init(capture.parameters):
        for shift in (0, 1, n_records // 2):
            order = torch.arange(n_records).roll(shift)
            rows = (order[:, None] * draws + torch.arange(draws)).flatten()
            losses(rows).sum().backward()
            grads = capture.take().per_record_grads
            if shift == 0:
                first = grads
            elif not all(torch.equal(a[order], b) for a, b in zip(first, grads, strict=True)):
                raise ValueError(
                    f"with physical_batch_size {n_records} and {draws} draws per record, rounding "
                    "makes a record's gradient depend on its place in the batch; choose a "
                    "physical_batch_size that is a multiple of 8, or 1"
                )


def check_updated(capture: Capture, before: list[Tensor], noise_multiplier: float) -> None:
    """Raise PrivacyError unless the module's trainable tensors are those the optimizer moved.

    ``before``: copies of ``capture.parameters`` from before the first step.
    """
    in_module = {id(p) for p in capture.module.parameters() if p.requires_grad}
    if in_module != {id(p) for p in capture.parameters}:
        raise PrivacyError(
            "the module's trainable tensors are no longer the captured ones; move, cast and adapt "
            "the module before it is captured"
        )
    for name, param, old in zip(_names(capture), capture.parameters, before, strict=True):
        if noise_multiplier > 0 and torch.equal(param.detach(), old):
            raise PrivacyError(
                f"{name!r} did not move in the first step although noise was added to its "
                "gradient; give capture.parameters to the optimizer, with a learning rate above 0"
            )


@contextmanager
def _moved_off_init(params: list[nn.Parameter]) -> Iterator[None]:
    # LoRA starts with lora_b = 0, where the gradient of lora_a vanishes and shows nothing.
    saved = [param.detach().clone() for param in params]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in params:
            step = torch.randn(param.shape, generator=generator) / max(param.shape) ** 0.5
            param.add_(step.to(param))
    try:
        yield
    finally:
        with torch.no_grad():
            for param, old in zip(params, saved, strict=True):
                param.copy_(old)


def _names(capture: Capture) -> list[str]:
    names = {id(param): name for name, param in capture.module.named_parameters()}
    return [names[id(param)] for param in capture.parameters]


def _norm(grads: Iterable[Tensor]) -> float:
    return sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
