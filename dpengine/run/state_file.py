"""Files of a state: tensors, numbers, texts, lists, tuples and dicts in one safetensors file.

The tensors are those of the file; all else is JSON in its metadata, with a version of the format
and the SHA-256 of the whole file, in which the 64 digits themselves count as zeros. Equal states
have equal bytes. There is no pickle. A file is whole and as it was written, or it is refused before
its content is parsed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import durable

_FORMAT = "dpengine state 1"
_ZEROS = b"0" * 64
_BEFORE = b'\\"sha256\\": \\"'
"""What the digits stand behind, and nothing before them: the state comes later."""


def write(path: str | PathLike | BinaryIO, state: dict[str, Any]) -> None:
    """Write ``state`` to a file, durably, whole or not at all; or to an open one.

    Raises TypeError, with nothing written, for what is neither a tensor nor of JSON's kinds.
    """
    content = encode(state)
    if hasattr(path, "write"):
        path.write(content)
    else:
        durable.write(_checked(path), content)


def read(path: str | PathLike | BinaryIO) -> dict[str, Any]:
    """What ``write`` was given. Raises ValueError where a byte differs, OSError without a file.

    A file is not read where its size is not the one that its header tells.
    """
    if hasattr(path, "read"):
        return decode(path.read())
    size = _told_size(_checked(path))
    return decode(durable.read(Path(path), at_most=size))


def encode(state: dict[str, Any]) -> bytes:
    """The content of a file with ``state``."""
    tensors: dict[str, Tensor] = {}
    rest = _to_json(state, "", tensors)
    # One text, as safetensors puts several in any order.
    text = json.dumps({"format": _FORMAT, "sha256": _ZEROS.decode(), "state": rest})
    content = save(_separate(tensors), {"dpengine": text})
    place = content.index(_BEFORE + _ZEROS) + len(_BEFORE)
    return content[:place] + _digest(content, place) + content[place + 64 :]


def decode(content: bytes) -> dict[str, Any]:
    """The state of a file with ``content``. Raises ValueError where a byte differs."""
    place = content.find(_BEFORE) + len(_BEFORE)
    if content[place : place + 64] != _digest(content, place):
        raise ValueError("the digest differs")
    try:
        rest = json.loads(_header(content)["__metadata__"]["dpengine"])
        if rest["format"] != _FORMAT:
            raise ValueError(f"the format is {rest['format']!r}, and not {_FORMAT!r}")
        return _from_json(rest["state"], load(content))
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("the file is of another kind") from error


def _digest(content: bytes, place: int) -> bytes:
    view = memoryview(content)
    digest = hashlib.sha256(view[:place])
    digest.update(_ZEROS)
    digest.update(view[place + 64 :])
    return digest.hexdigest().encode()


def _header(content: bytes) -> dict[str, Any]:
    # A file of safetensors begins with the size of its header, 8 bytes, and the header as JSON.
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _told_size(path: Path) -> int:
    """The size of a file by its own header. Raises ValueError where the file has another."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if length > size:
            raise ValueError("the header is cut")
        try:
            tensors = _header(first + file.read(length))
            tensors.pop("__metadata__", None)
            told = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("the header is of another kind") from error
    if told != size:
        raise ValueError(f"the file has {size} bytes and not {told}")
    return size


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON types; its tensors go to ``tensors``, under the keys that lead to them.

    JSON has texts as keys alone and no tuples: a container is written as its kind and its items.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        while name in tensors:
            name += "'"
        tensors[name] = value
        return ["tensor", name]
    inner = f"{name}." if name else ""
    if isinstance(value, Mapping):
        keys = [_to_json(key, name, {}) for key in value]
        items = [_to_json(v, f"{inner}{key}", tensors) for key, v in value.items()]
        return ["dict", list(zip(keys, items, strict=True))]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_to_json(v, f"{inner}{n}", tensors) for n, v in enumerate(value)]]
    raise TypeError(
        "a checkpoint holds tensors, numbers, texts, lists, tuples and dicts, and no objects, got "
        f"a {type(value).__name__} in {name!r}; give what it consists of"
    )


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_from_json(key, tensors): _from_json(item, tensors) for key, item in content}
    items = [_from_json(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


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


def _checked(path: str | PathLike) -> Path:
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must name a file, got {type(path).__name__}")
    return Path(path)
