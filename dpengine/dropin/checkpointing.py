"""Checkpoints of a user's own loop."""

import copy
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, BinaryIO

from torch import Tensor

from ..optim import DPOptimizer
from ..run import state_file

_INSTEAD = {
    "torch_save_kwargs": "leave it out, the file is safetensors and JSON",
    "torch_load_kwargs": "leave it out, the file is safetensors and JSON",
    "noise_scheduler": "leave it out, the noise of drawn batches is charged and stays constant",
    "grad_clip_scheduler": "put its state_dict() in checkpoint_dict",
}

_OWN = ("module_state_dict", "privacy_accountant_state_dict")


@dataclass(frozen=True)
class EngineCheckpoint:
    """State of module, optimizer and accountant, and what the caller added."""

    module: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    accountant: dict[str, Any]
    extra: dict[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        """What the caller added, and under Opacus' names what it added itself."""
        return self.extra | dict(zip(_OWN, (self.module, self.accountant), strict=True))


def refuse_arguments(refused: dict[str, Any]) -> None:
    """Raise TypeError for arguments of Opacus that have no meaning here."""
    for name, value in refused.items():
        if name not in _INSTEAD:
            raise TypeError(f"got an unexpected argument {name!r}")
        if value is not None:
            raise TypeError(f"{name} is not taken: {_INSTEAD[name]}")


def save(
    path: str | PathLike | BinaryIO,
    module: dict[str, Tensor],
    optimizer: DPOptimizer | None,
    accountant: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all. Raises TypeError for objects in it."""
    of_optimizer = None
    if optimizer is not None:
        of_optimizer = {
            "state_dict": optimizer.original_optimizer.state_dict(),
            "filter": optimizer.filter.state_dict(),
            "max_grad_norm": optimizer.max_grad_norm,
        }
    extra = {name: value for name, value in extra.items() if name not in _OWN}
    state = EngineCheckpoint(dict(module), of_optimizer, accountant, extra)
    state_file.write(path, vars(state))


def load(path: str | PathLike | BinaryIO) -> EngineCheckpoint:
    """Read a checkpoint. Raises ValueError where it is damaged or of another kind."""
    try:
        return EngineCheckpoint(**state_file.read(path))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged, or was not written by save_checkpoint; take another"
        ) from error


def without_wrapper(state: EngineCheckpoint) -> EngineCheckpoint:
    """``state`` under the names that a module has itself, not within Opacus' `_module`."""
    names = state.module
    if not names or not all(name.startswith("_module.") for name in names):
        return state
    module = {name.removeprefix("_module."): tensor for name, tensor in names.items()}
    return replace(state, module=module)


def check_fits(
    state: EngineCheckpoint, module: dict[str, Tensor], optimizer: DPOptimizer | None, strict: bool
) -> None:
    """Raise ValueError where ``state`` is that of another module, optimizer or filter."""
    wrong = [n for n, t in state.module.items() if n in module and module[n].shape != t.shape]
    if strict:
        wrong += sorted(module.keys() ^ state.module.keys())
    if wrong:
        raise ValueError(
            f"the checkpoint is of another module: {wrong[0]!r} is not in both, or has another "
            "shape; load it into a module that is made and adapted as the saved one was"
        )
    if optimizer is None:
        return
    saved = [len(group["params"]) for group in state.optimizer["state_dict"]["param_groups"]]
    if saved != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("the checkpoint is of an optimizer with other param_groups")
    copy.deepcopy(optimizer.filter).load_state_dict(state.optimizer["filter"])


def restore_optimizer(optimizer: DPOptimizer, state: dict[str, Any]) -> None:
    """Give ``optimizer`` back what ``save`` kept of one: no batch is under way."""
    optimizer.original_optimizer.load_state_dict(state["state_dict"])  # charges are in already
    optimizer.filter.load_state_dict(state["filter"])
    optimizer.discard()
    if optimizer.clipping.bound_moves:
        optimizer.max_grad_norm = state["max_grad_norm"]
