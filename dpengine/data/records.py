"""The private records: read once, all of them, before anything is spent."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..mechanism.units import number_units
from ..settings import DIGITS
from . import captions
from .files import decode
from .tables import PERSONS, UNITS_FILE, is_units_file, read_units, same_form

_HELD_OUT = 360
_KOHYA_FOLDER = re.compile(r"\d+_(.+)", re.DOTALL)


@dataclass(frozen=True)
class Records:
    """Images float32 [N, C, H, W] in [-1, 1], labels int64 [N] and whose they are. All private.

    unit_ids: int64 [N], 0 to U - 1, each taken; None where every record is a unit of its own.
    captions: what each image shows, in place of a text for each label.
    conditions: once encoded, what the denoiser is given with a record of each label, a line of each
        tensor for it; the images are then their latents.
    """

    images: Tensor
    labels: Tensor
    unit_ids: np.ndarray | None = None
    captions: tuple[str, ...] | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)

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


def load(source: str, class_names: Sequence[str] | None, channels: int, size: int) -> Records:
    """Read ``source``: `digits`, an `.npz` file, or a folder with one sub-folder for each class.

    Images are cropped to a centred square and resized to [channels, size, size] by rules that
    look at one image at a time. An `.npz` holds images uint8 [N, H, W], [N, H, W, C] or
    [N, C, H, W] and integer labels, named `images` and `labels` (or `x_train` and `y_train`); a
    label is a position in ``class_names``; where these are None, labels are not read and come back
    as 0. A sub-folder carries the name of its class; every file in it is an image of 8 bits per
    channel, unless its name begins with a dot (``files``).

    Whose the records are may be said by an array `unit_ids` of whole numbers or strings in the
    `.npz`, or by a file `units.csv` in the folder, with the columns `file_name`, relative to the
    folder, and `unit_id`; it lists every image once. ``units`` says which ids make one unit.

    Where ``class_names`` are None, a folder may have captions instead (``captions``).

    Raises ValueError that names what cannot be read, an image that `units.csv` leaves out, one
    file under two names that are not one unit's, or a label outside the classes. Warns, by two
    names, where records of two units are the same picture. Neither tells how many there are.
    """
    path = Path(source)
    if source == DIGITS:
        return _fitted(*_digits(held_out=False), None, channels, size)
    if path.suffix.lower() == ".npz" and path.is_file():
        images, labels, unit_ids = _read_npz(path)
        if len(labels) == 0:
            raise ValueError(f"data {source!r} holds no images")
        if class_names is None:
            labels = torch.zeros_like(labels)
        else:
            _check_labels(labels, len(class_names), source)
        records = _fitted(images, labels, unit_ids, channels, size)
        names = [f"image {number}" for number in range(len(labels))]
    elif path.is_dir():
        if class_names is None and captions.are_in(path):
            records, names = _read_captioned(path, channels, size)
        else:
            records, names = _read_folder(path, class_names, channels, size)
    else:
        raise ValueError(
            f"data must be {DIGITS!r}, an .npz file or a folder of images, got {source!r}, "
            "which is none of them"
        )
    _tell_copies(source, records, names)
    return records


def class_names(source: str) -> tuple[str, ...]:
    """The names of the classes of ``source``, where it has them: its sub-folders, which are public.

    Raises ValueError for an `.npz`, whose labels are numbers.
    """
    if source == DIGITS:
        return tuple(str(digit) for digit in range(10))
    path = Path(source)
    if not path.is_dir():
        raise ValueError(
            f"data {source!r} has numbers for classes; give class_names, one for each in the order "
            "of the labels, or a prompt without {class}"
        )
    names = tuple(same_form(child.name) for child in _visible(path) if child.is_dir())
    if not names:
        raise ValueError(f"folder {path} must hold one sub-folder for each class; got none")
    return names


def _check_labels(labels: Tensor, num_classes: int, source: str) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"data {source!r} holds a label outside the {num_classes} classes, 0 to "
            f"{num_classes - 1}: {int(labels[outside][0])}"
        )


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
                "and each is protected on its own: together less. Remove copies, or give them one "
                "unit_id (unit_ids in the .npz, units.csv in the folder)",
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
        if any(word in name.casefold() for word in PERSONS):
            raise ValueError(
                f"{path} holds an array {name!r}, which is not read; name whose each image is "
                "'unit_ids', or leave the array out"
            )
    planes = _planes(path, images)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels in {path} must be whole numbers [N], one for each image, got {_form(labels)}"
            + (", of another N" if labels.ndim and len(labels) != len(images) else "")
        )
    if unit_ids is not None:
        if unit_ids.shape != labels.shape:
            raise ValueError(
                f"unit_ids in {path} must be [N], one for each image, got {_form(unit_ids)}"
            )
        unit_ids = number_units(unit_ids, f"unit_ids in {path}")
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


def _form(array: np.ndarray) -> str:
    """Type and shape, without the number of records, which may be private."""
    return f"{array.dtype} [{', '.join(['N', *map(str, array.shape[1:])][: array.ndim])}]"


def _read_folder(
    root: Path, class_names: Sequence[str] | None, channels: int, size: int
) -> tuple[Records, list[str]]:
    """The records of the folder ``root``, and the name of each."""
    children = _visible(root)
    tables = [child for child in children if is_units_file(child)]
    if len(tables) > 1:
        raise ValueError(f"folder {root} must hold one {UNITS_FILE}, got {tables[0]} as well")
    folders = [child for child in children if child not in tables]
    names_of = class_names
    if class_names is None:  # any sub-folder will do, and all labels are 0
        names_of = [child.name for child in folders if child.is_dir()]
    if not folders:
        raise ValueError(_folder_rule(root, names_of, "no sub-folder"))
    number_of: dict[str, int] = {}
    for number, name in enumerate(names_of):
        number_of.setdefault(same_form(name), 0 if class_names is None else number)
    for folder in folders:
        if not folder.is_dir() or same_form(folder.name) not in number_of:
            raise ValueError(_folder_rule(root, names_of, folder.name + _hint(folder, number_of)))
    files = [file for folder in folders for file in _visible(folder)]
    if not files:
        raise ValueError(f"folder {root} holds no images")
    stray = next(filter(is_units_file, files), None)
    if stray is not None:
        raise ValueError(f"{stray} must lie in {root}, beside the folders of the classes")
    names = [same_form(file.relative_to(root).as_posix()) for file in files]
    unit_ids = read_units(tables[0], names) if tables else None
    _refuse_one_file_twice(files, unit_ids)
    images = [_fit(_to_unit_range(decode(file, channels)[None]), channels, size) for file in files]
    labels = torch.tensor([number_of[same_form(file.parent.name)] for file in files])
    return Records(torch.cat(images), labels, unit_ids), names


def _read_captioned(root: Path, channels: int, size: int) -> tuple[Records, list[str]]:
    """The records of a folder whose images have captions, and the name of each."""
    found = captions.read(root)
    if not found.files:
        raise ValueError(f"folder {root} holds no images")
    names = [same_form(file.relative_to(root).as_posix()) for file in found.files]
    tables = [child for child in _visible(root) if is_units_file(child)]
    if tables and found.unit_ids is not None:
        raise ValueError(f"{tables[0]} and the table of captions both name units; leave one out")
    unit_ids = read_units(tables[0], names) if tables else None
    if found.unit_ids is not None:
        unit_ids = number_units(list(found.unit_ids), f"unit_id in {root}")
    _refuse_one_file_twice(list(found.files), unit_ids)
    images = [_fit(_to_unit_range(decode(f, channels)[None]), channels, size) for f in found.files]
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Records(torch.cat(images), labels, unit_ids, found.captions), names


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise ValueError(f"cannot list folder {folder}: {error.strerror}") from None


def _hint(folder: Path, number_of: dict[str, int]) -> str:
    """What may be meant by a child of the data's folder that is named after no class."""
    name = same_form(folder.name)
    if not folder.is_dir():
        return f", which is no folder; images lie in them, and no table but {UNITS_FILE} is read"
    kohya = _KOHYA_FOLDER.fullmatch(name)
    if kohya and kohya[1] in number_of:
        return f"; images are not repeated here, so name it {kohya[1]}"
    for known in number_of:
        if known.strip().casefold() == name.strip().casefold():
            return f"; name it {known} if that is meant"
    if any((folder / known).is_dir() for known in number_of):
        return f", in which the classes' folders are; give {folder} as the data"
    return ""


def _folder_rule(root: Path, class_names: Sequence[str], got: str) -> str:
    more = f" and {len(class_names) - 20} more" if len(class_names) > 20 else ""
    return (
        f"folder {root} must hold one sub-folder for each class, named as in "
        f"{list(class_names[:20])}{more}; got {got}"
    )


def _refuse_one_file_twice(files: list[Path], unit_ids: np.ndarray | None) -> None:
    """Raise ValueError where one file is there under two names that are not of one unit."""
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
                f"{files[known]} and {file} are one file under two names, which would count as two "
                "units and be protected as half of each: remove one, or give both one unit_id in "
                f"{UNITS_FILE}"
            )


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
