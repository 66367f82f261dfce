"""The private records: read once, all of them, before anything is spent."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .settings import DIGITS

_HELD_OUT = 360
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Records:
    """Images float32 [N, C, H, W] in [-1, 1] and labels int64 [N]. Private, both."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return "Records(private)"


def load(source: str, class_names: list[str], channels: int, size: int) -> Records:
    """Read ``source``: `digits`, an `.npz` file, or a folder with one sub-folder for each class.

    Images are cropped to a centred square and resized to [channels, size, size] by rules that
    look at one image at a time. An `.npz` holds images uint8 [N, H, W] or [N, H, W, C] and
    integer labels, named `images` and `labels` (or `x_train` and `y_train`); a label is a
    position in ``class_names``. A sub-folder carries the name of its class; every file in it is
    an image of 8 bits per channel, unless its name begins with a dot. Transparency is ignored.

    Raises ValueError that names what cannot be read, or a label outside the classes.
    """
    path = Path(source)
    if source == DIGITS:
        images, labels = _digits(held_out=False)
    elif path.suffix == ".npz" and path.is_file():
        images, labels = _read_npz(path)
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
    return Records(torch.cat(fitted), labels)


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


def _read_npz(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            names = ("images", "labels") if "images" in file else ("x_train", "y_train")
            images, labels = (file[name] for name in names)
    except Exception as error:
        # A damaged file makes zipfile, zlib, tokenize and numpy raise errors of many types.
        raise ValueError(
            f"cannot read {path}: it must be an .npz file with the arrays 'images' and 'labels'"
        ) from error
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (1,), (3,))
    ):
        raise ValueError(
            f"images in {path} must be uint8 [N, H, W] or [N, H, W, C] with C of 1 or 3, got "
            f"{images.dtype} with {images.ndim} dimensions"
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"images in {path} must be at least one pixel wide and high")
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels in {path} must be whole numbers, one for each image")
    planes = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _to_unit_range(planes), torch.from_numpy(labels.astype(np.int64))


def _read_folder(root: Path, class_names: list[str], channels: int, size: int) -> Records:
    folders = sorted(child for child in root.iterdir() if not child.name.startswith("."))
    unknown = [child.name for child in folders if child.name not in class_names]
    if unknown or not folders:
        raise ValueError(
            f"folder {root} must hold one sub-folder for each class, named as in "
            f"{class_names}; got {unknown[0] if unknown else 'no sub-folder'}"
        )
    images, labels = [], []
    for folder in folders:
        for file in _image_files(folder):
            images.append(_fit(_decode(file, channels), channels, size))
            labels.append(class_names.index(folder.name))
    if not images:
        raise ValueError(f"folder {root} holds no images")
    return Records(torch.cat(images), torch.tensor(labels))


def _image_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            yield file


def _decode(file: Path, channels: int) -> Tensor:
    try:
        with Image.open(file) as image:
            mode, num_frames = image.mode, getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    except Exception:
        # A damaged file makes the decoders raise errors of many types.
        raise ValueError(f"cannot read image {file}; repair or remove it") from None
    if mode not in _EIGHT_BIT_MODES or num_frames > 1:
        kind = f"{num_frames} frames" if num_frames > 1 else f"pixels of mode {mode}"
        raise ValueError(
            f"image {file} has {kind}; save it as one frame of 8 bits per channel, scaled by a "
            "constant that is the same for all images"
        )
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return _to_unit_range(planes[None])


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
