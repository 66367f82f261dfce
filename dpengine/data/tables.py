"""`units.csv`, the table that says whose each image of a folder is, and names of files."""

import csv
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from ..mechanism.units import number_units

UNITS_FILE = "units.csv"
"""Name of the optional file, in the root of an image folder, that says whose each image is."""

PERSONS = ("unit", "person", "patient", "subject")
"""What a column or array that names persons has in its name."""

_UNITS_HEADER = ["file_name", "unit_id"]


def is_units_file(path: Path) -> bool:
    """Whether ``path`` is such a table."""
    return path.name.lower() == UNITS_FILE and path.is_file()


def same_form(name: str) -> str:
    """``name`` in one Unicode form: file systems differ in it, people do not."""
    return unicodedata.normalize("NFC", name)


def read_units(units_file: Path, names: list[str]) -> np.ndarray:
    """Whose each of the images ``names`` is, by the table ``units_file``.  int64 [N]"""
    known = set(names)
    if len(known) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two images have names that look the same, {twice}; rename one")
    unit_of: dict[str, str] = {}
    for name, unit in _read_table(units_file, known):
        if name not in known:
            raise ValueError(
                f"{units_file} lists {name}, which is no image of the folder; name images by "
                "their path from the folder, such as CLASS/IMAGE.png"
            )
        if name in unit_of:
            raise ValueError(f"{units_file} lists {name} twice; an image belongs to one unit")
        unit_of[name] = unit
    missing = [name for name in names if name not in unit_of]
    if missing:
        raise ValueError(f"{units_file} does not list {missing[0]}; every image needs a unit_id")
    return number_units(
        [unit_of[name] for name in names], f"the column unit_id of {units_file}", names
    )


def _read_table(units_file: Path, known: set[str]) -> Iterator[tuple[str, str]]:
    try:
        with units_file.open(encoding="utf-8-sig", newline="") as handle:
            header, *lines = list(csv.reader(handle, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {units_file}: it must be CSV text in UTF-8") from error
    if [name.strip().casefold() for name in header] != _UNITS_HEADER:
        raise ValueError(
            f"the first line of {units_file} must be {','.join(_UNITS_HEADER)}, with a comma"
        )
    for line in filter(any, lines):
        name, unit = (line[0], line[1].strip()) if len(line) == 2 else (line[0], "")
        if not unit:
            raise ValueError(f"{units_file} must give one file_name and one unit_id for {name!r}")
        as_listed, of_windows = (
            same_form(PurePosixPath(path).as_posix()) for path in (name, name.replace("\\", "/"))
        )
        yield (of_windows if as_listed not in known else as_listed), unit
