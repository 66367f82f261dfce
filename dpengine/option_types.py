"""Options as users write them: paths, and sizes of memory."""

import os
import re
from fractions import Fraction
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

_SIZE = re.compile(r"(\d+\.?\d*(?:e[+-]?\d{1,2})?)\s*(?:([kmgt])(i?)b|b)?", re.ASCII | re.I)


def _path(words: list[str]) -> str:
    """A path as a shell means it. Errors are no ValueError, which tyro would dress up."""
    expanded = os.path.expanduser(words[0])
    if not words[0]:
        raise OSError("an empty string names no file; give a path, `.` for the folder you are in")
    if expanded.startswith("~"):
        raise OSError(
            f"the home folder in {words[0]!r} is not known; write the path out, or begin it with ./"
        )
    return expanded


UserPath = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""Type of an option that names a file or folder: `~` is the home folder, wherever it is written."""


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `8GB` (10^9), `512MiB` (2^20) or `4e9`, rounded down.

    Raises ValueError for anything else and for sizes below one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        number, prefix, binary = match.groups()
        power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
        size = int(Fraction(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise ValueError(f"max_memory must be a size such as 8GB, 512MiB or 4e9, got {text!r}")
    return size
