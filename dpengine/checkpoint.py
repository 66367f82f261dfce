"""Checkpoints: generations of a run's state, each committed whole by its manifest.

A checkpoint holds what has been released: weights, their average, the optimizer's state. It holds
no sum, no gradient, no key and no random state. `step-000002.json` is the manifest of the state
after two steps: the SHA-256 and size of each file of the generation, the state that is no tensor,
the ledger's head, and its own SHA-256. It is written last, and a generation without it is none.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import digests, durable

_KEEP = 2
_MAX_MANIFEST = 2**26


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
    optimizer_tensors, optimizer_rest = split_optimizer(checkpoint.optimizer)
    filter_tensors = {
        f"filter.{k}": v for k, v in checkpoint.filter.items() if isinstance(v, Tensor)
    }
    content = save(checkpoint.tensors | optimizer_tensors | filter_tensors)
    file = folder / f"step-{checkpoint.num_updates:06d}.safetensors"
    manifest, _ = digests.encode(
        {
            "num_updates": checkpoint.num_updates,
            "ledger_head": checkpoint.ledger_head,
            "reserved": checkpoint.reserved,
            "max_grad_norm": checkpoint.max_grad_norm,
            "optimizer": optimizer_rest,
            "lr_scheduler": checkpoint.lr_scheduler,
            "filter": {k: v for k, v in checkpoint.filter.items() if not isinstance(v, Tensor)},
            "files": {file.name: {"size": len(content), "sha256": digests.sha256(content)}},
        }
    )
    commit = file.with_suffix(".json")
    if commit.exists():  # its files are about to change
        durable.remove(commit)
        durable.sync_folder(folder)
    durable.write(file, content)
    durable.write(commit, manifest)
    _remove_all_but(folder, _manifests(folder)[-_KEEP:])


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in ``folder``, or None where there is none.

    Each file is compared with its digest before it is parsed, and not read where its size is
    another one. Raises ValueError, which names the file, where a byte differs.
    """
    manifests = _manifests(folder)
    if not manifests:
        return None
    commit = manifests[-1]
    tensors_file = commit.with_suffix(".safetensors")
    broken = commit
    try:
        manifest, _ = digests.decode(durable.read(commit, at_most=_MAX_MANIFEST))
        (described,) = manifest.pop("files").items()
        broken = tensors_file
        tensors = load(_read_file(tensors_file, *described))
        broken = commit
        if manifest["num_updates"] != int(commit.stem[5:]):
            raise ValueError("the manifest is of another step")
        manifest["optimizer"] = join_optimizer(manifest["optimizer"], tensors)
        for name in [name for name in tensors if name.startswith("filter.")]:
            manifest["filter"][name.removeprefix("filter.")] = tensors.pop(name)
        return Checkpoint(tensors=tensors, **manifest)
    except (
        SafetensorError,
        FileNotFoundError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        before = f"go on from {manifests[-2].name}" if manifests[:-1] else "go on from the start"
        raise ValueError(
            f"checkpoint {broken} is damaged; restore it from a copy, or remove {commit} to "
            f"{before}: the steps in between stay charged"
        ) from error


def _read_file(file: Path, name: str, described: dict[str, Any]) -> bytes:
    """The content of a generation's file. Raises ValueError where the manifest tells another."""
    if name != file.name:
        raise ValueError(f"the manifest is of {name}")
    content = durable.read(file, at_most=described["size"])
    if digests.sha256(content) != described["sha256"]:
        raise ValueError("the digest of a file differs from its manifest")
    return content


def _manifests(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    # Not a glob, which takes a folder that cannot be read for an empty one.
    files = [file for file in folder.iterdir() if re.fullmatch(r"step-\d+\.json", file.name)]
    return sorted(files, key=lambda file: int(file.stem[5:]))


def _remove_all_but(folder: Path, kept: list[Path]) -> None:
    """Remove the other generations, manifests first, and what a crash has left."""
    names = {file.with_suffix(suffix).name for file in kept for suffix in (".json", ".safetensors")}
    ours = re.compile(r"step-\d+\.(json|safetensors)|\.step-\d+\.\w+\.tmp")
    old = [file for file in folder.iterdir() if ours.fullmatch(file.name)]
    old = [file for file in old if file.name not in names]
    for file in sorted(old, key=lambda file: file.suffix != ".json"):
        durable.remove(file)


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
