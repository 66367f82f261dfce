"""Checkpoints: generations of a run's state, each a file that is whole or is none.

A checkpoint holds what has been released: weights, their average, the optimizer's state. It holds
no sum, no gradient, no key and no random state. `step-000002.safetensors` is the state after two
steps and the ledger's head (``state_file``).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import durable, state_file

_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after ``num_updates`` whole steps: named tensors, and everything else as JSON types.

    filter: state of the filter of noised gradients; max_grad_norm: the bound of the next step,
    which adaptive clipping has moved by noised counts; ledger_head and reserved: the last line of
    the ledger when this was written, and the steps charged up to it.
    """

    num_updates: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    filter: dict[str, Any]
    max_grad_norm: float
    ledger_head: str
    reserved: int


def make_folder(folder: Path) -> None:
    """Make the folder of checkpoints, and show that a file can be written there.

    Raises OSError where it cannot, which is better known before a step is charged.
    """
    durable.make_folder(folder)
    probe = folder / ".probe"
    durable.write(probe, b"")
    durable.remove(probe)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``, durably, and drop all but the last two."""
    if not folder.is_dir():
        make_folder(folder)
    file = folder / f"step-{checkpoint.num_updates:06d}.safetensors"
    state_file.write(file, vars(checkpoint))
    _remove_all_but(folder, _files(folder)[-_KEEP:])


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder``, or None where there is none.

    Raises ValueError, which names the file and the way out, where a byte of it differs.
    """
    files = _files(folder)
    if not files:
        return None
    try:
        checkpoint = Checkpoint(**state_file.read(files[-1]))
        if files[-1].stem != f"step-{checkpoint.num_updates:06d}":
            raise ValueError("the state is of another step")
        return checkpoint
    except (ValueError, TypeError) as error:
        before = f"go on from {files[-2].name}" if files[:-1] else "go on from the start"
        raise ValueError(
            f"checkpoint {files[-1]} is damaged; restore it from a copy, or remove it to {before}: "
            "the steps in between stay charged"
        ) from error


def _files(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    # Not a glob, which takes a folder that cannot be read for an empty one.
    names = [f for f in folder.iterdir() if re.fullmatch(r"step-\d+\.safetensors", f.name)]
    return sorted(names, key=lambda file: int(file.stem[5:]))


def _remove_all_but(folder: Path, kept: list[Path]) -> None:
    """Remove the other generations, and what a crash has left."""
    ours = re.compile(r"step-\d+\.safetensors|\.step-\d+\.\w+\.tmp")
    for file in sorted(folder.iterdir()):
        if ours.fullmatch(file.name) and file not in kept:
            durable.remove(file)
