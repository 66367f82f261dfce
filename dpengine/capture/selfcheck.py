"""Checks before training that no trainable tensor is missed and no record touches another.

They run on synthetic rows only, so what they find is public.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import PrivacyError
from .capture import Capture, Loss, Pass
from .probing import changed, first_change, mixing, moved_off_init, randomness, run_parts

Losses = Callable[[slice | Tensor], Tensor]
"""One loss per row for a choice of fixed synthetic rows, a whole number of records."""

_ZERO = 1e-6
_RECORDED = 0.05
"""Half precision rounds otherwise when it is compiled; a wrong graph is wrong altogether."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
"""By the type in which gradients are kept: a sound rule errs by its rounding, and little more."""


def freeze_inert_tensors(module: nn.Module, losses: Losses) -> list[str]:
    """Freeze each trainable tensor whose gradient is zero everywhere, and return their names.

    Query and key of an attention over a single token are the common case: the softmax over one
    value is constant. Such tensors cannot learn; noise in them would be noise for nothing.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with moved_off_init(list(named.values())):
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
    difference; the error names the module that mixes, where one does.
    """
    # An axis that is as long as the batch by chance, and taken for it, is not so at both sizes.
    for size in (n_records, n_records - 1):
        _check_per_record_grads(capture, losses, size)


def _check_per_record_grads(capture: Capture, losses: Losses, n_records: int) -> None:
    draws = capture.draws_per_record
    with moved_off_init(capture.parameters):
        losses(slice(n_records * draws)).mean().backward()
        batch = capture.take()
        captured = [n_records * grads.double() for grads in batch.per_record_grads]
        alone = []
        with capture.suspended():
            for n in range(n_records):
                loss = losses(slice(n * draws, (n + 1) * draws)).mean()
                alone.append(torch.autograd.grad(loss, capture.parameters))
        names = _names(capture)
        tolerance = _TOLERANCE[capture.layout.dtype]
        differing = [names[i] for i in range(len(names)) if _differs(i, captured, alone, tolerance)]
        if differing:
            with capture.suspended():
                cause = _cause(capture.module, losses, n_records, draws)
            raise PrivacyError(
                f"the per-record gradient of {differing[0]!r} differs from that of its record "
                f"alone: {cause}"
            )


def check_pass(capture: Capture, backward: Pass, loss: Loss, rows: dict[str, Tensor]) -> None:
    """Raise PrivacyError unless ``backward``, a recorded pass, gives the eager pass's gradients.

    ``rows``: synthetic records. Eager gradients were compared with single records before.
    """
    with moved_off_init(capture.parameters):
        loss(rows).backward()
        eager = [grads.double() for grads in capture.take().per_record_grads]
        backward(rows)
        recorded = [grads.double() for grads in capture.take().per_record_grads]
    total = _norm(eager)
    for name, expected, grads in zip(_names(capture), eager, recorded, strict=True):
        if not (grads - expected).norm() <= _RECORDED * (expected.norm() + _ZERO * total):
            raise PrivacyError(
                f"the recorded pass gives other gradients of {name!r} than the eager one; choose "
                "compile eager"
            )


def check_slots(capture: Capture, backward: Pass, rows: dict[str, Tensor]) -> None:
    """Raise ValueError unless a record's gradient has the same bits in every slot of a batch.

    ``rows``: synthetic records, a physical batch of the shape that ``backward`` will be used with.
    Otherwise a record would move the rounding of those that come after it.
    """
    draws = capture.draws_per_record
    n_records = len(next(iter(rows.values()))) // draws
    with moved_off_init(capture.parameters):
        for shift in (0, 1, n_records // 2):
            order = torch.arange(n_records).roll(shift)
            index = (order[:, None] * draws + torch.arange(draws)).flatten()
            backward({name: tensor[index.to(tensor.device)] for name, tensor in rows.items()})
            grads = [grad.clone() for grad in capture.take().per_record_grads]
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


def _differs(
    index: int, captured: list[Tensor], alone: list[tuple[Tensor, ...]], tolerance: float
) -> bool:
    """Whether the tensor number ``index`` has other gradients in the batch than alone."""
    total = torch.tensor([_norm(grads) for grads in alone])  # [N]
    expected = torch.stack([grads[index].double() for grads in alone])
    error = (captured[index] - expected).reshape(len(alone), -1).norm(dim=1)
    bound = tolerance * expected.reshape(len(alone), -1).norm(dim=1) + _ZERO * total.to(error)
    return not (error <= bound).all()


def _cause(module: nn.Module, losses: Losses, n_records: int, draws: int) -> str:
    """What makes a record's gradient in the batch another than alone, and the way out."""
    rows = torch.arange(n_records * draws).view(n_records, draws)
    calls, of_rows = run_parts(module, partial(losses, rows.flatten()))
    every = torch.ones(rows.numel(), dtype=torch.bool)
    again, _ = run_parts(module, partial(losses, rows.flatten()))
    if cause := randomness(first_change(calls, again, every)):
        return cause
    loss_mixes = False
    for n in range(n_records):
        # Another synthetic record in the place of record n: nothing may change for the others.
        order = torch.arange(n_records)
        order[n] = (n + 1) % n_records
        perturbed, perturbed_losses = run_parts(module, partial(losses, rows[order].flatten()))
        others = (torch.arange(n_records) != n).repeat_interleave(draws)
        if cause := mixing(first_change(calls, perturbed, others)):
            return cause
        loss_mixes |= changed(of_rows.detach(), perturbed_losses.detach(), others)
    if loss_mixes:
        return (
            "the loss mixes the records of a batch; no module does, but the loss of one record "
            "changes with another: compute it for each row alone, without terms or scales that "
            "are taken over the batch"
        )
    return (
        "no forward pass and no loss mixes the records of a batch, so the model uses this tensor "
        "where its rule does not see it, or the rule is wrong for its layer: freeze the tensor, or "
        "use it through its own layer alone"
    )


def _names(capture: Capture) -> list[str]:
    names = {id(param): name for name, param in capture.module.named_parameters()}
    return [names[id(param)] for param in capture.parameters]


def _norm(grads: Iterable[Tensor]) -> float:
    return sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
