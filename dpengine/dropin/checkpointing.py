"""Checkpoints of a user's own loop: one safetensors file, no pickle."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from .. import durable
from ..adaptive import Adaptive
from ..checkpoint import join_optimizer, split_optimizer
from ..optimizer import DPOptimizer

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
    """Write a checkpoint, whole or not at all. Raises TypeError for what JSON does not know."""
    tensors = {f"module.{name}": tensor for name, tensor in module.items()}
    extra = {name: value for name, value in extra.items() if name not in _OWN}
    rest = {"accountant": accountant, "extra": _encode(extra, "extra", tensors)}
    if optimizer is not None:
        of_optimizer, rest["optimizer"] = split_optimizer(optimizer.original_optimizer.state_dict())
        of_filter = optimizer.filter.state_dict()
        tensors |= of_optimizer
        tensors |= {
            f"filter.{name}": value for name, value in of_filter.items() if _is_tensor(value)
        }
        rest["filter"] = {name: v for name, v in of_filter.items() if not _is_tensor(v)}
        rest["max_grad_norm"] = optimizer.max_grad_norm
    try:
        state = json.dumps(rest)
    except TypeError as error:
        raise TypeError(
            "a checkpoint holds tensors and what JSON knows, and no objects: give the optimizer's "
            "groups numbers, texts, lists and dicts"
        ) from error
    tensors = _separate(tensors)
    metadata = {"state": state, "sha256": _digest(tensors, state)}
    content = to_bytes(tensors, metadata)
    if hasattr(path, "write"):
        path.write(content)
    else:
        durable.write(_file(path), content)


def load(path: str | PathLike | BinaryIO) -> EngineCheckpoint:
    """Read a checkpoint. Raises ValueError where it is damaged or of another kind."""
    if not hasattr(path, "read"):
        _file(path)
    try:
        metadata, tensors = _read(path)
        if metadata["sha256"] != _digest(tensors, metadata["state"]):
            raise ValueError("the digest differs")
        rest = json.loads(metadata["state"])
        optimizer = None
        if "optimizer" in rest:
            of_filter = rest["filter"] | _take(tensors, "filter.")
            optimizer = {
                "state_dict": join_optimizer(rest["optimizer"], tensors),
                "filter": of_filter,
                "max_grad_norm": rest["max_grad_norm"],
            }
        module, extra = _take(tensors, "module."), _decode(rest["extra"], tensors)
        return EngineCheckpoint(module, optimizer, rest["accountant"], extra)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
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
    if isinstance(optimizer.clipping, Adaptive):
        optimizer.max_grad_norm = state["max_grad_norm"]


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON types; its tensors go to ``tensors``.

    JSON has texts as keys alone and no tuples: a container is written as its kind and its items.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, Mapping):
        keys = [_encode(key, f"{name}.key", {}) for key in value]
        items = [_encode(v, f"{name}.{n}", tensors) for n, v in enumerate(value.values())]
        return ["dict", list(zip(keys, items, strict=True))]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encode(v, f"{name}.{n}", tensors) for n, v in enumerate(value)]]
    raise TypeError(
        f"checkpoint_dict must hold tensors, numbers, texts, lists, tuples and dicts, got a "
        f"{type(value).__name__}; a checkpoint holds no objects: give what it consists of"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``_encode`` was given."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _file(path: str | PathLike) -> Path:
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must name a file, got {type(path).__name__}")
    return Path(path)


def _read(path: str | PathLike | BinaryIO) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file."""
    if not hasattr(path, "read"):
        with safe_open(Path(path), framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = path.read()
    tensors = from_bytes(content)
    # A file of safetensors begins with the size of its header, 8 bytes, and the header as JSON.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"], tensors


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(prefix)
    }


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share their memory with another, as tied weights do."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        tied = tensor.numel() > 0 and address in seen
        separate[name] = tensor.detach().clone() if tied else tensor.detach().contiguous()
        seen.add(address)
    return separate


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 of all that a checkpoint says."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
