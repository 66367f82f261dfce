"""Checkpoints: one safetensors file each, written whole or not at all.

A checkpoint holds what has been released: weights, their average, the optimizer's state. It holds
no sum, no gradient, no key and no random state.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .ledger import sync_folder

_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after ``num_updates`` whole steps: named tensors, and everything else as JSON types.

    filter: state of the filter of noised gradients; max_grad_norm: the bound of the next step,
    which adaptive clipping has moved by noised counts.
    """

    num_updates: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    filter: dict[str, Any]
    max_grad_norm: float


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``, durably, and drop all but the last two."""
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
    optimizer_tensors, optimizer_rest = split_optimizer(checkpoint.optimizer)
    filter_tensors = {
        f"filter.{k}": v for k, v in checkpoint.filter.items() if isinstance(v, Tensor)
    }
    rest = {
        "num_updates": checkpoint.num_updates,
        "optimizer": optimizer_rest,
        "lr_scheduler": checkpoint.lr_scheduler,
        "filter": {k: v for k, v in checkpoint.filter.items() if not isinstance(v, Tensor)},
        "max_grad_norm": checkpoint.max_grad_norm,
    }
    tensors = checkpoint.tensors | optimizer_tensors | filter_tensors
    content = save(tensors, {"state": json.dumps(rest)})
    file = folder / f"step-{checkpoint.num_updates:06d}.safetensors"
    write_durably(file, content)
    for old in _files(folder)[:-_KEEP]:
        old.unlink()


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder``, or None where there is none."""
    files = _files(folder)
    if not files:
        return None
    try:
        with safe_open(files[-1], framework="pt") as file:
            rest = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        optimizer = join_optimizer(rest.pop("optimizer"), tensors)
        for name in [name for name in tensors if name.startswith("filter.")]:
            rest["filter"][name.removeprefix("filter.")] = tensors.pop(name)
        return Checkpoint(tensors=tensors, optimizer=optimizer, **rest)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {files[-1]} is damaged; remove it to resume from the one before"
        ) from error


def write_durably(file: Path, content: bytes) -> None:
    """Put ``content`` in ``file``: all on disk when this returns, or the old file as it was."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), key=lambda file: int(file.stem[5:]))


def split_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as named tensors, and the rest as JSON types."""
    tensors, rest = {}, {}
    for index, state in optimizer["state"].items():
        rest[index] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        named = {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        tensors |= named
    return tensors, {"state": rest, "param_groups": optimizer["param_groups"]}


def join_optimizer(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {int(index): dict(values) for index, values in rest["state"].items()}
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, index, key = name.split(".", 2)
        state[int(index)][key] = tensors.pop(name)
    return {"state": state, "param_groups": rest["param_groups"]}
