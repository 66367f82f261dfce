"""The private records: read once, all of them, before anything is spent."""

import csv
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .images import read_image
from .settings import DIGITS
from .units import unit_numbers

UNITS_FILE = "units.csv"
"""Name of the optional file, in the root of an image folder, that says whose each image is."""

_HELD_OUT = 360
_UNITS_HEADER = ["file_name", "unit_id"]
_KOHYA_FOLDER = re.compile(r"\d+_(.+)", re.DOTALL)
_PERSONS = ("unit", "person", "patient", "subject")


@dataclass(frozen=True)
class Records:
    """Images float32 [N, C, H, W] in [-1, 1], labels int64 [N] and whose they are. All private.

    unit_ids: int64 [N], 0 to U - 1, each taken; None where every record is a unit of its own.
    """

    images: Tensor
    labels: Tensor
    unit_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_units(self) -> int:
        """U, the number of units; private unless adjacency is zero-out."""
        return len(self) if self.unit_ids is None else int(self.unit_ids.max()) + 1

    @property
    def has_units(self) -> bool:
        """Whether the data names units; public, as is what else makes up its form."""
        return self.unit_ids is not None

    def __repr__(self) -> str:
        return "Records(private)"


def load(source: str, class_names: list[str], channels: int, size: int) -> Records:
    """Read ``source``: `digits`, an `.npz` file, or a folder with one sub-folder for each class.

    Images are cropped to a centred square and resized to [channels, size, size] by rules that
    look at one image at a time. An `.npz` holds images uint8 [N, H, W], [N, H, W, C] or
    [N, C, H, W] and integer labels, named `images` and `labels` (or `x_train` and `y_train`); a
    label is a position in ``class_names``. A sub-folder carries the name of its class; every file
    in it is an image that ``read_image`` reads, unless its name begins with a dot.

    Whose the records are may be said by an array `unit_ids` of whole numbers or strings in the
    `.npz`, or by a file `units.csv` in the folder, with the columns `file_name`, relative to the
    folder, and `unit_id`; it lists every image once. ``unit_numbers`` tells which ids are one
    unit's. Class and file names are the same in all Unicode forms.

    Raises ValueError that names what cannot be read, an image that `units.csv` leaves out, one
    file under two names that are not one unit's, or a label outside the classes. Warns, by two
    names, where records of two units are the same picture.
    """
    path = Path(source)
    if source == DIGITS:
        return _fitted(*_digits(held_out=False), None, channels, size)
    if path.suffix.lower() == ".npz" and path.is_file():
        images, labels, unit_ids = _read_npz(path)
        names = [f"image {number}" for number in range(len(labels))]
        if len(labels) == 0:
            raise ValueError(f"data {source!r} holds no images")
        outside = (labels < 0) | (labels >= len(class_names))
        if outside.any():
            raise ValueError(
                f"data {source!r} holds a label outside the base model's {len(class_names)} "
                f"classes, 0 to {len(class_names) - 1}: {int(labels[outside][0])}"
            )
        records = _fitted(images, labels, unit_ids, channels, size)
    elif path.is_dir():
        records, names = _read_folder(path, class_names, channels, size)
    else:
        raise ValueError(
            f"data must be {DIGITS!r}, an .npz file or a folder of images, got {source!r}, "
            "which is none of them"
        )
    _tell_copies(source, records, names)
    return records


def held_out_digits() -> Records:
    """The 360 real digits that no run trains on, for measuring."""
    return Records(*_digits(held_out=True))


def _fitted(
    images: Tensor, labels: Tensor, unit_ids: np.ndarray | None, channels: int, size: int
) -> Records:
    fitted = [_fit(chunk, channels, size) for chunk in images.split(4096)]
    return Records(torch.cat(fitted), labels, unit_ids)


def _tell_copies(source: str, records: Records, names: list[str]) -> None:
    """Warn where two units have the same picture, for one picture may be one person's.

    Equal pictures need not be copies, so they are read; those of one value hold nothing.
    """
    units = range(len(records)) if records.unit_ids is None else records.unit_ids.tolist()
    first: dict[bytes, int] = {}
    for number, (unit, image) in enumerate(zip(units, records.images.numpy(), strict=True)):
        if image.min() == image.max():
            continue
        known = first.setdefault(hashlib.blake2b(image.tobytes()).digest(), number)
        if units[known] != unit:
            warnings.warn(
                f"data {source!r}: {names[known]!r} and {names[number]!r} are the same picture, "
                "and each is protected on its own: together less. Remove copies, or "
                "give them one unit_id (unit_ids in the .npz, units.csv in the folder)",
                stacklevel=3,
            )
            return


def _digits(*, held_out: bool) -> tuple[Tensor, Tensor]:
    pixels, target = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, target, test_size=_HELD_OUT, stratify=target, random_state=0
    )
    x, y = (test_x, test_y) if held_out else (train_x, train_y)
    images = torch.from_numpy(x / 8 - 1).float().reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(y).long()


def _read_npz(path: Path) -> tuple[Tensor, Tensor, np.ndarray | None]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            names = ("images", "labels") if "images" in file else ("x_train", "y_train")
            images, labels = (file[name] for name in names)
            unit_ids = file.get("unit_ids")
            others = set(file) - {"unit_ids"}
    except Exception as error:
        # A damaged file makes zipfile, zlib, tokenize and numpy raise errors of many types.
        raise ValueError(
            f"cannot read {path}: it must be an .npz file with the arrays 'images' and 'labels', "
            "and perhaps 'unit_ids', none of them of Python objects"
        ) from error
    for name in sorted(others):
        if any(word in name.casefold() for word in _PERSONS):
            raise ValueError(
                f"{path} holds an array {name!r}, which is not read; name whose each image is "
                "'unit_ids', or leave the array out"
            )
    planes = _planes(path, images)
    labels = _labels(path, labels, len(images))
    if unit_ids is not None:
        if unit_ids.shape != labels.shape or unit_ids.dtype.kind not in "iufSU":
            raise ValueError(
                f"unit_ids in {path} must be whole numbers or strings, one for each image, got "
                f"{_form(unit_ids)}"
            )
        unit_ids = _numbered(path, unit_ids)
    return _to_unit_range(planes), torch.from_numpy(labels.astype(np.int64)), unit_ids


def _planes(path: Path, images: np.ndarray) -> np.ndarray:
    """Images with their channels, 1 or 3, first or last or left out.  uint8 -> [N, C, H, W]"""
    planes = images[:, None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        planes = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or planes.ndim != 4 or planes.shape[1] not in (1, 3):
        raise ValueError(
            f"images in {path} must be uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 "
            f"or 3, got {_form(images)}"
        )
    if 0 in planes.shape[1:]:
        raise ValueError(f"images in {path} must be at least one pixel wide and high")
    return planes


def _labels(path: Path, labels: np.ndarray, n_images: int) -> np.ndarray:
    """Labels [N], or a column [N, 1] of them.  -> [N]"""
    column = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if column.ndim != 1 or len(column) != n_images or column.dtype.kind not in "iu":
        other = ", of another N" if labels.ndim > 0 and len(labels) != n_images else ""
        raise ValueError(
            f"labels in {path} must be whole numbers [N], one for each image, got {_form(labels)}"
            f"{other}"
        )
    return column


def _form(array: np.ndarray) -> str:
    """Type and shape, without the number of records, which may be private."""
    return f"{array.dtype} [{', '.join(['N', *map(str, array.shape[1:])][: array.ndim])}]"


def _numbered(source: Path, unit_ids: np.ndarray | list[str]) -> np.ndarray:
    try:
        return unit_numbers(unit_ids)
    except ValueError as error:
        raise ValueError(f"in {source}, {error}") from None


def _read_folder(
    root: Path, class_names: list[str], channels: int, size: int
) -> tuple[Records, list[str]]:
    """The records of the folder ``root``, and the name of each."""
    children = _visible(root)
    tables = [
        child for child in children if child.name.casefold() == UNITS_FILE and child.is_file()
    ]
    if len(tables) > 1:
        raise ValueError(
            f"folder {root} holds {tables[0].name} and {tables[1].name}; keep one, {UNITS_FILE}"
        )
    folders = [child for child in children if child not in tables]
    if not folders:
        raise ValueError(_folder_rule(root, class_names, "no sub-folder"))
    label_of = {folder: _label(folder, class_names) for folder in folders}
    files = [file for folder in folders for file in _visible(folder)]
    for file in files:
        if file.name.casefold() == UNITS_FILE:
            raise ValueError(f"{file} must lie in {root}, beside the folders of the classes")
    if not files:
        raise ValueError(f"folder {root} holds no images")
    names = [file.relative_to(root).as_posix() for file in files]
    unit_ids = _read_units(tables[0], names) if tables else None
    _refuse_one_file_twice(files, unit_ids)
    images = [
        _fit(_to_unit_range(read_image(file, channels)[None]), channels, size) for file in files
    ]
    labels = torch.tensor([label_of[file.parent] for file in files])
    return Records(torch.cat(images), labels, unit_ids), names


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot list folder {folder}: {error.strerror}") from None


def _label(folder: Path, class_names: list[str]) -> int:
    """The class that ``folder`` is named after, in whatever Unicode form."""
    form = unicodedata.normalize("NFC", folder.name)
    alike = [name for name in class_names if unicodedata.normalize("NFC", name) == form]
    if folder.is_dir() and (folder.name in class_names or len(alike) == 1):
        return class_names.index(folder.name if folder.name in class_names else alike[0])
    kohya = _KOHYA_FOLDER.fullmatch(folder.name)
    near = [name for name in class_names if name.strip().casefold() == form.strip().casefold()]
    got = folder.name
    if not folder.is_dir():
        got += f", which is no folder; images lie in them, and no table but {UNITS_FILE} is read"
    elif kohya and kohya[1] in class_names:
        got += f"; images are not repeated here, so name it {kohya[1]}"
    elif near:
        got += f"; name it {near[0]} if that is meant"
    elif any((folder / name).is_dir() for name in class_names):
        got += f", in which the classes' folders are; give {folder} as the data"
    raise ValueError(_folder_rule(folder.parent, class_names, got))


def _folder_rule(root: Path, class_names: list[str], got: str) -> str:
    more = f" and {len(class_names) - 20} more" if len(class_names) > 20 else ""
    return (
        f"folder {root} must hold one sub-folder for each class, named as in {class_names[:20]}"
        f"{more}; got {got}"
    )


def _refuse_one_file_twice(files: list[Path], unit_ids: np.ndarray | None) -> None:
    """Raise ValueError where two names of one file, by links, are not of one unit."""
    units = range(len(files)) if unit_ids is None else unit_ids.tolist()
    first: dict[tuple[int, int], int] = {}
    for number, file in enumerate(files):
        try:
            status = file.stat()
        except OSError:
            continue  # reading it will tell why
        known = first.setdefault((status.st_dev, status.st_ino), number)
        if units[known] != units[number]:
            raise ValueError(
                f"{files[known]} and {file} are links to one file, and one image must not be two "
                f"units'; leave one out, or give both one unit_id in {UNITS_FILE}"
            )


def _read_units(units_file: Path, names: list[str]) -> np.ndarray:
    """Whose each of the images ``names`` is, by the table ``units_file``.  int64 [N]"""
    exact, in_form = set(names), _by_form(names)
    unit_of: dict[str, str] = {}
    for as_listed, unit in _read_table(units_file):
        spellings = [PurePosixPath(s).as_posix() for s in (as_listed, as_listed.replace("\\", "/"))]
        found = [s for s in spellings if s in exact] or [
            name for s in spellings for name in in_form.get(unicodedata.normalize("NFC", s), [])
        ]
        if not found:
            raise ValueError(
                f"{units_file} lists {spellings[0]}, which is no image of the folder; name images "
                "by their path from the folder, such as CLASS/IMAGE.png"
            )
        if len(set(found)) > 1:
            raise ValueError(
                f"{units_file} lists {as_listed}, and two images of the folder have names that "
                "look so; rename one"
            )
        if found[0] in unit_of:
            raise ValueError(f"{units_file} lists {found[0]} twice; an image belongs to one unit")
        unit_of[found[0]] = unit
    missing = [name for name in names if name not in unit_of]
    if missing:
        raise ValueError(f"{units_file} does not list {missing[0]}; every image needs a unit_id")
    return _numbered(units_file, [unit_of[name] for name in names])


def _by_form(names: list[str]) -> dict[str, list[str]]:
    """Names by their composed Unicode form, in which macOS does not keep them."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return forms


def _read_table(units_file: Path) -> Iterator[tuple[str, str]]:
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
        yield name, unit


def _to_unit_range(planes: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(planes)).float() / 127.5 - 1


def _fit(images: Tensor, channels: int, size: int) -> Tensor:
    """[n, c, h, w] -> [n, channels, size, size]: grey or colour, centred square, antialiased."""
    if images.shape[1] == 3 and channels == 1:
        # Luma weights of ITU-R BT.601, those of Pillow's "L".
        images = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    images = images.expand(-1, channels, -1, -1)
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images.contiguous()
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(-1, 1)
