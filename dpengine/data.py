"""The private records: read once, all of them, before anything is spent."""

import csv
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .image_files import decode
from .settings import DIGITS
from .units import number_units

UNITS_FILE = "units.csv"
"""Name of the optional file, in the root of an image folder, that says whose each image is."""

_HELD_OUT = 360
_UNITS_HEADER = ["file_name", "unit_id"]


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
    look at one image at a time. An `.npz` holds images uint8 [N, H, W] or [N, H, W, C] and
    integer labels, named `images` and `labels` (or `x_train` and `y_train`); a label is a
    position in ``class_names``. A sub-folder carries the name of its class; every file in it is
    an image of 8 bits per channel, unless its name begins with a dot (``image_files``).

    Whose the records are may be said by an array `unit_ids` of whole numbers or strings in the
    `.npz`, or by a file `units.csv` in the folder, with the columns `file_name`, relative to the
    folder, and `unit_id`; it lists every image once. ``units`` says which ids make one unit.

    Raises ValueError that names what cannot be read, an image that `units.csv` leaves out, a file
    that is there twice, or a label outside the classes.
    """
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names of the base model must be texts, got {class_names}")
    path = Path(source)
    unit_ids = None
    if source == DIGITS:
        images, labels = _digits(held_out=False)
    elif path.suffix.lower() == ".npz" and path.is_file():
        images, labels, unit_ids = _read_npz(path)
    elif path.is_dir():
        return _read_folder(path, class_names, channels, size)
    else:
        raise ValueError(
            f"data must be {DIGITS!r}, an .npz file or a folder of images, got {source!r}, "
            "which is none of them"
        )
    if len(labels) == 0:
        raise ValueError(f"data {source!r} holds no images")
    outside = (labels < 0) | (labels >= len(class_names))
    if outside.any():
        raise ValueError(
            f"data {source!r} holds a label outside the base model's {len(class_names)} classes, "
            f"0 to {len(class_names) - 1}: {int(labels[outside][0])}"
        )
    fitted = [_fit(chunk, channels, size) for chunk in images.split(4096)]
    return Records(torch.cat(fitted), labels, unit_ids)


def held_out_digits() -> Records:
    """The 360 real digits that no run trains on, for measuring."""
    return Records(*_digits(held_out=True))


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
    except Exception as error:
        # A damaged file makes zipfile, zlib, tokenize and numpy raise errors of many types.
        raise ValueError(
            f"cannot read {path}: it must be an .npz file with the arrays 'images' and 'labels', "
            "and perhaps 'unit_ids', none of them of Python objects"
        ) from error
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (1,), (3,))
    ):
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        raise ValueError(
            f"images in {path} must be uint8 [N, H, W] or [N, H, W, C] with C of 1 or 3, got "
            f"{images.dtype} of shape {images.shape}"
            + ("; put the channels last, images.transpose(0, 2, 3, 1)" if first else "")
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"images in {path} must be at least one pixel wide and high")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels in {path} must be whole numbers [N], one for each image, got {labels.dtype} "
            f"of shape {labels.shape} beside images of shape {images.shape}"
        )
    if unit_ids is not None:
        if unit_ids.shape != labels.shape:
            raise ValueError(
                f"unit_ids in {path} must be one for each of the images, got shape "
                f"{unit_ids.shape} beside labels of {labels.shape}"
            )
        unit_ids = number_units(unit_ids, f"unit_ids in {path}")
    planes = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _to_unit_range(planes), torch.from_numpy(labels.astype(np.int64)), unit_ids


def _read_folder(root: Path, class_names: list[str], channels: int, size: int) -> Records:
    children = sorted(child for child in root.iterdir() if not child.name.startswith("."))
    tables = [child for child in children if _is_units_file(child)]
    if len(tables) > 1:
        raise ValueError(f"folder {root} must hold one {UNITS_FILE}, got {tables[0]} as well")
    units_file = tables[0] if tables else None
    folders = [child for child in children if child != units_file]
    number_of = {_same_form(name): number for number, name in enumerate(class_names)}
    unknown = [child.name for child in folders if _same_form(child.name) not in number_of]
    if unknown or not folders:
        raise ValueError(
            f"folder {root} must hold one sub-folder for each class, named as in "
            f"{class_names}; got {unknown[0] if unknown else 'no sub-folder'}"
        )
    files = [file for folder in folders for file in _image_files(folder)]
    if not files:
        raise ValueError(f"folder {root} holds no images")
    unit_ids = None
    if units_file is not None:
        unit_ids = _read_units(units_file, files)
    else:
        _refuse_repeats(files)
    images = [_fit(_to_unit_range(decode(file, channels)[None]), channels, size) for file in files]
    labels = torch.tensor([number_of[_same_form(file.parent.name)] for file in files])
    return Records(torch.cat(images), labels, unit_ids)


def _is_units_file(path: Path) -> bool:
    return path.name.lower() == UNITS_FILE and path.is_file()


def _same_form(name: str) -> str:
    """File systems differ in the Unicode form of a name; people do not."""
    return unicodedata.normalize("NFC", name)


def _refuse_repeats(files: list[Path]) -> None:
    """Raise ValueError where one file is there under two names: it would be two records."""
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        if not file.is_file():
            continue
        status = file.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), file)
        if other != file:
            raise ValueError(
                f"{other} and {file} are one file under two names, which would count as two "
                "records and be protected as half of each: remove one, or name the person of each "
                f"image in {UNITS_FILE}"
            )


def _read_units(units_file: Path, files: list[Path]) -> np.ndarray:
    """Whose each of ``files`` is, by the table ``units_file``.  int64 [N]"""
    unit_of: dict[str, str] = {}
    for name, unit in _read_table(units_file):
        if name in unit_of:
            raise ValueError(f"{units_file} lists {name} twice; an image belongs to one unit")
        unit_of[name] = unit
    names = [_same_form(file.relative_to(units_file.parent).as_posix()) for file in files]
    missing = [name for name in names if name not in unit_of]
    if missing:
        raise ValueError(f"{units_file} does not list {missing[0]}; every image needs a unit_id")
    unknown = unit_of.keys() - set(names)
    if unknown:
        raise ValueError(
            f"{units_file} lists {min(unknown)}, which is no image of the folder; name images by "
            "their path from the folder, such as CLASS/IMAGE.png"
        )
    return number_units(
        [unit_of[name] for name in names], f"the column unit_id of {units_file}", names
    )


def _read_table(units_file: Path) -> Iterator[tuple[str, str]]:
    try:
        with units_file.open(encoding="utf-8-sig", newline="") as handle:
            header, *lines = list(csv.reader(handle, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {units_file}: it must be CSV text in UTF-8") from error
    if header != _UNITS_HEADER:
        raise ValueError(f"the first line of {units_file} must be {','.join(_UNITS_HEADER)}")
    for line in filter(None, lines):
        name, unit = (line[0], line[1].strip()) if len(line) == 2 else (line[0], "")
        if not unit:
            raise ValueError(f"{units_file} must give one file_name and one unit_id for {name!r}")
        # Tables made on Windows.
        name = name if (units_file.parent / name).exists() else name.replace("\\", "/")
        yield _same_form(PurePosixPath(name).as_posix()), unit


def _image_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            yield file


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
