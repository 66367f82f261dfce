"""Captions of private images: a table beside them, or a text beside each.

`metadata.jsonl` or `metadata.csv` (Hugging Face's convention) lists every image of the folder and
of those in it by `file_name`, with its `text`, and perhaps with a `unit_id` that says whose it is.
Otherwise a `.txt` of the same name lies beside each image (kohya's convention). Captions are
private: no error shows one.
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .tables import PERSONS, is_units_file, same_form

TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Captioned:
    """Image files with what each shows. unit_ids: whose each is, where the table says so."""

    files: tuple[Path, ...] = field(repr=False)
    captions: tuple[str, ...] = field(repr=False)
    unit_ids: tuple[Any, ...] | None = field(default=None, repr=False)


def are_in(root: Path) -> bool:
    """Whether the folder ``root`` has captions: a table, or texts beside images."""
    files = [file for file in root.iterdir() if file.is_file()]
    return any(_is_table(file) for file in files) or any(_is_text(file) for file in files)


def read(root: Path) -> Captioned:
    """The images of ``root`` and their captions, in the order of their names.

    Raises ValueError, which names a file or a line and no caption, for an image without a caption
    or listed twice, a name that is no image of the folder, and a table that cannot be read or names
    persons otherwise than by `unit_id`.
    """
    tables = [file for file in sorted(root.iterdir()) if _is_table(file)]
    if len(tables) > 1:
        raise ValueError(f"folder {root} must hold one of {' and '.join(TABLES)}, got both")
    files = {_name(root, file): file for file in _files(root)}
    if tables:
        return _of_table(tables[0], files)
    texts = {name: file for name, file in files.items() if _is_text(file)}
    images = {name: file for name, file in sorted(files.items()) if name not in texts}
    captions = []
    for name, image in images.items():
        text = texts.pop(str(PurePosixPath(name).with_suffix(".txt")), None)
        if text is None:
            raise ValueError(f"image {image} has no caption; put a .txt of its name beside it")
        captions.append(_decoded(text).strip())
    if texts:
        raise ValueError(f"{next(iter(texts.values()))} is the caption of no image; remove it")
    return Captioned(tuple(images.values()), tuple(captions))


def _of_table(table: Path, files: dict[str, Path]) -> Captioned:
    listed: dict[str, dict[str, Any]] = {}
    for number, row in _rows(table):
        name = row.get("file_name")
        if not isinstance(name, str) or not isinstance(row.get("text"), str):
            raise ValueError(f"{table}, line {number}: needs the texts file_name and text")
        name = same_form(PurePosixPath(name).as_posix())
        if name in listed:
            raise ValueError(f"{table}, line {number}: {name} is listed twice")
        if name not in files:
            raise ValueError(f"{table}, line {number}: {name} is no file of the folder")
        for column in row:
            if column != "unit_id" and any(word in column.casefold() for word in PERSONS):
                raise ValueError(
                    f"{table} has a column {column!r}, which is not read; name whose each image is "
                    "unit_id, or leave it out"
                )
        listed[name] = row
    missing = sorted(files.keys() - listed.keys())
    if missing:
        raise ValueError(f"{table} does not list {missing[0]}; every image needs a text")
    names = sorted(listed)
    with_unit = [name for name in names if "unit_id" in listed[name]]
    if with_unit and len(with_unit) < len(names):
        raise ValueError(f"{table} gives a unit_id to some images; give one to each, or to none")
    return Captioned(
        tuple(files[name] for name in names),
        tuple(listed[name]["text"] for name in names),
        tuple(listed[name]["unit_id"] for name in names) if with_unit else None,
    )


def _rows(table: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a table, by their number."""
    text = _decoded(table)
    if table.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table} must have the columns file_name and text")
        rows = [(reader.line_num, dict(row)) for row in reader]
        if any(None in row for _, row in rows):
            raise ValueError(f"{table} has a line with more fields than columns")
        return rows
    rows = []
    # Not splitlines(), which cuts captions at U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{table}, line {number}: is no JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {number}: is no JSON object")
        rows.append((number, row))
    return rows


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"cannot read {file}: it must be text in UTF-8") from None


def _files(root: Path) -> list[Path]:
    """All files of a folder and of those in it but tables and what is hidden."""
    found = []
    for child in sorted(root.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            found += _files(child)
        elif not _is_table(child) and not is_units_file(child):
            found.append(child)
    return found


def _name(root: Path, file: Path) -> str:
    return same_form(file.relative_to(root).as_posix())


def _is_table(file: Path) -> bool:
    return file.name.lower() in TABLES


def _is_text(file: Path) -> bool:
    return file.suffix.lower() == ".txt" and not file.name.startswith(".")
