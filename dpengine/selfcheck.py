"""Checks before training that no trainable tensor is missed and no record touches another.

They run on synthetic rows only, so what they find is public.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .capture import Capture, count_rows
from .errors import PrivacyError
from .passes import Loss, Pass
from .rerouting import Hook

Losses = Callable[[slice | Tensor], Tensor]
"""One loss per row for a choice of fixed synthetic rows, a whole number of records."""

_ZERO = 1e-6
_RECORDED = 0.05
"""Half precision rounds otherwise when it is compiled; a wrong graph is wrong altogether."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
"""By the type in which gradients are kept: a sound rule errs by its rounding, and little more."""
_SAME = 1e-5
"""Relative difference up to which two runs gave the same; what rounding alone may cause."""


@dataclass(frozen=True)
class _Call:
    """A call of a module, with copies of the tensors that went in and came out."""

    module: str
    inputs: list[Tensor]
    outputs: list[Tensor]


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
    difference; the error names the module that mixes, where one does.
    """
    # An axis that is as long as the batch by chance, and taken for it, is not so at both sizes.
    for size in (n_records, n_records - 1):
        _check_per_record_grads(capture, losses, size)


def _check_per_record_grads(capture: Capture, losses: Losses, n_records: int) -> None:
    draws = capture.draws_per_record
    with _moved_off_init(capture.parameters):
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


def check_rows_apart_once(capture: Capture) -> None:
    """Look at the first batch of two records or more whether the module keeps them apart.

    Raises PrivacyError from that forward pass, before its records are part of a batch, where the
    output for one record changes with another, or with nothing. What is told is the name of a
    module. A loss outside of the module is not seen; ``check_per_record_grads`` sees it.
    """
    draws = capture.draws_per_record

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        n_rows = count_rows((*args, *kwargs.values()))
        if n_rows < 2 * draws:
            return
        with torch.no_grad(), capture.suspended():
            _check_rows_apart(module, (args, kwargs), n_rows, draws)
        handle.remove()  # not before: what was refused stays refused

    handle = capture.module.register_forward_pre_hook(Hook(look), with_kwargs=True, prepend=True)
    capture.at_detach(handle.remove)


def _check_rows_apart(module: nn.Module, inputs: tuple, n_rows: int, draws: int) -> None:
    def call(silenced: slice) -> Any:
        def choose(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != n_rows:
                return leaf
            chosen = leaf.clone()
            chosen[silenced] = 0
            return chosen

        args, kwargs = tree_map(choose, inputs)
        return module(*args, **kwargs)

    def whole(silenced: slice) -> list[_Call]:
        return [_Call(_who("", module), [], _copies(call(silenced)))]

    def parts(silenced: slice) -> list[_Call]:
        return _run(module, partial(call, silenced))[0]

    # The outputs of every part would take much memory: they are looked at where the whole mixes,
    # and where it gives a loss of its own, in which no record can be told from another.
    rows = torch.ones(n_rows, dtype=torch.bool)
    has_rows = any(_has_rows(tensor, rows) for tensor in whole(slice(0, 0))[0].outputs)
    cause = _mixing_of_rows(whole if has_rows else parts, n_rows, draws)
    if cause:
        cause = _mixing_of_rows(parts, n_rows, draws) or cause
        raise PrivacyError(f"the records of a batch are not kept apart: {cause}")


def _mixing_of_rows(run: Callable[[slice], list[_Call]], n_rows: int, draws: int) -> str | None:
    """What changes the output of one record when another is silenced, or nothing is."""
    calls, record = run(slice(0, 0)), torch.arange(n_rows) // draws
    cause = _randomness(_first_change(calls, run(slice(0, 0)), record >= 0))
    for silenced in (slice(0, draws), slice(n_rows - draws, n_rows)):
        others = record != record[silenced][0]
        cause = cause or _mixing(_first_change(calls, run(silenced), others))
    return cause


def check_pass(capture: Capture, backward: Pass, loss: Loss, rows: tuple[Tensor, ...]) -> None:
    """Raise PrivacyError unless ``backward``, a recorded pass, gives the eager pass's gradients.

    ``rows``: synthetic records. Eager gradients were compared with single records before.
    """
    with _moved_off_init(capture.parameters):
        loss(*rows).backward()
        eager = [grads.double() for grads in capture.take().per_record_grads]
        backward(*rows)
        recorded = [grads.double() for grads in capture.take().per_record_grads]
    total = _norm(eager)
    for name, expected, grads in zip(_names(capture), eager, recorded, strict=True):
        if not (grads - expected).norm() <= _RECORDED * (expected.norm() + _ZERO * total):
            raise PrivacyError(
                f"the recorded pass gives other gradients of {name!r} than the eager one; choose "
                "compile eager"
            )


def check_slots(capture: Capture, backward: Pass, rows: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless a record's gradient has the same bits in every slot of a batch.

    ``rows``: synthetic records, a physical batch of the shape that ``backward`` will be used with.
    Otherwise a record would move the rounding of those that come after it.
    """
    draws = capture.draws_per_record
    n_records = len(rows[0]) // draws
    with _moved_off_init(capture.parameters):
        for shift in (0, 1, n_records // 2):
            order = torch.arange(n_records).roll(shift)
            index = (order[:, None] * draws + torch.arange(draws)).flatten()
            backward(*(tensor[index.to(tensor.device)] for tensor in rows))
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
    calls, of_rows = _run(module, partial(losses, rows.flatten()))
    every = torch.ones(rows.numel(), dtype=torch.bool)
    again, _ = _run(module, partial(losses, rows.flatten()))
    if cause := _randomness(_first_change(calls, again, every)):
        return cause
    loss_mixes = False
    for n in range(n_records):
        # Another synthetic record in the place of record n: nothing may change for the others.
        order = torch.arange(n_records)
        order[n] = (n + 1) % n_records
        perturbed, perturbed_losses = _run(module, partial(losses, rows[order].flatten()))
        others = (torch.arange(n_records) != n).repeat_interleave(draws)
        if cause := _mixing(_first_change(calls, perturbed, others)):
            return cause
        loss_mixes |= _changed(of_rows.detach(), perturbed_losses.detach(), others)
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


def _randomness(module: str | None) -> str | None:
    return module and (
        f"{module} gives other outputs for the same inputs, as dropout does, whose generator is "
        "not secret: set it to 0"
    )


def _mixing(module: str | None) -> str | None:
    return module and (
        f"{module} mixes the records of a batch, its output for one record changes with another; "
        "replace it by a module that treats each row on its own, as GroupNorm or LayerNorm instead "
        "of a normalisation over the batch"
    )


def _run(module: nn.Module, forward: Callable[[], Any]) -> tuple[list[_Call], Any]:
    """Every call of a module in the order in which they end, inner ones first; and the result."""
    calls: list[_Call] = []
    begun: list[list[Tensor]] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begun.append(_copies((args, kwargs)))

    def end(who: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        calls.append(_Call(who, begun.pop(), _copies(output)))

    with ExitStack() as hooks:
        for name, child in module.named_modules():
            for hook in (
                child.register_forward_pre_hook(begin, with_kwargs=True),
                child.register_forward_hook(partial(end, _who(name, child)), with_kwargs=True),
            ):
                hooks.callback(hook.remove)
        return calls, forward()


def _who(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"module {name!r}, a {kind}," if name else f"the whole model, a {kind},"


def _copies(tree: object) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _first_change(before: list[_Call], after: list[_Call], rows: Tensor) -> str | None:
    """The first module whose output changed in ``rows``, bool [N·K], and whose input did not.

    An output without rows, such as a mean, mixes nothing by itself.
    """
    for one, other in zip(before, after, strict=False):
        if one.module != other.module or len(one.inputs) != len(other.inputs):
            return None  # another way through the model
        outputs = zip(one.outputs, other.outputs, strict=False)
        inputs = zip(one.inputs, other.inputs, strict=True)
        if any(_has_rows(a, rows) and _changed(a, b, rows) for a, b in outputs) and not any(
            _changed(a, b, rows) for a, b in inputs
        ):
            return one.module
    return None


def _has_rows(tensor: Tensor, rows: Tensor) -> bool:
    """Whether ``tensor`` has one line, or several as for attention heads, for each row."""
    return tensor.ndim > 0 and len(tensor) > 0 and len(tensor) % len(rows) == 0


def _changed(a: Tensor, b: Tensor, rows: Tensor) -> bool:
    """Whether two tensors differ in ``rows``; anywhere, where they have none."""
    if a.shape != b.shape:
        return True
    if _has_rows(a, rows):
        chosen = rows.repeat_interleave(len(a) // len(rows)).to(a.device)
        a, b = a[chosen], b[chosen]
    return float((a.double() - b.double()).norm()) > _SAME * float(a.double().norm())


@contextmanager
def _moved_off_init(params: list[nn.Parameter]) -> Iterator[None]:
    # LoRA starts with lora_b = 0, where the gradient of lora_a vanishes and shows nothing.
    saved = [param.detach().clone() for param in params]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in params:
            step = torch.randn(param.shape, generator=generator) / max((1, *param.shape)) ** 0.5
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
