"""Decoding of one private image, and what stands in its place where it is none."""

import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded. Pillow reads more, and some of it by starting programs (EPS: Ghostscript)."""

_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_RAW = {".dng", ".nef", ".cr2", ".arw", ".orf", ".rw2", ".pef", ".srw", ".raf"}
"""Cameras' raw files: TIFF by their first bytes, whose first picture is a thumbnail."""
_TEXTS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".xml"}
_KINDS = (
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript file, which would run as a program,"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file, which would run as a program,"),
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI volume"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (4, b"JXL ", "a JPEG XL image"),
    (4, b"ftyphei", "a HEIC photo"),
    (4, b"ftyphev", "a HEIC photo"),
    (4, b"ftypmif1", "a HEIC photo"),
    (4, b"ftypmsf1", "a HEIC photo"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyp", "a film"),
    (0, b"\x1aE\xdf\xa3", "a film"),
    (8, b"AVI ", "a film"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance image"),
    (0, b"\0\0\x01\0", "an icon"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\xd0\xcf\x11\xe0", "a file of Windows or Office, such as Thumbs.db,"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"version https://git-lfs", "a Git LFS pointer"),
)
"""Offset and bytes by which a kind of file is known that is not decoded."""


def decode(file: Path, channels: int) -> np.ndarray:
    """Read ``file`` as it is meant to be seen.  -> uint8 [channels, H, W], grey or RGB

    Turned as EXIF says, transparency over white; of a phone's photo with a second picture inside
    (MPO) the first.

    Raises ValueError, which names the file, what is wrong with it and the way out, for anything
    but one image of 8 bits per channel in a regular file of one of ``FORMATS``.
    """
    _check_regular(file)
    if file.suffix.lower() in _RAW:
        raise ValueError(
            f"cannot read image {file}: a camera's raw file is not a format that is read here; "
            "convert it to PNG or JPEG"
        )
    try:
        with warnings.catch_warnings():
            # Between half of Pillow's limit and the limit it warns; above, it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                mode = image.mode
                num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                pixels = _seen(image, channels)
    except PermissionError:
        raise ValueError(f"cannot read image {file}: this user may not; change its mode") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"cannot read image {file}: it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; "
            "scale it down"
        ) from None
    except Exception as error:
        # A damaged file makes the decoders raise errors of many types.
        raise ValueError(f"cannot read image {file}: {_cause(file, error)}") from None
    if mode not in _EIGHT_BIT_MODES or num_frames > 1:
        kind = f"{num_frames} frames" if num_frames > 1 else f"pixels of mode {mode}"
        raise ValueError(
            f"image {file} has {kind}; save it as one frame of 8 bits per channel, scaled by a "
            "constant that is the same for all images"
        )
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _seen(image: Image.Image, channels: int) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        # What lies under full transparency is no part of the picture, and often garbage.
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(upright.convert("L" if channels == 1 else "RGB"))


def _formats() -> list[str]:
    """Those of ``FORMATS`` that this build of Pillow decodes."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_regular(file: Path) -> None:
    """Raise ValueError for what is no regular file: to open a pipe would wait for ever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"cannot read image {file}: it is a link to nothing; remove it") from None
    except OSError as error:
        raise ValueError(f"cannot read image {file}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(
            f"cannot read image {file}: it is a folder; the images of a class lie in the folder of "
            "the class itself, not in folders below"
        )
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"cannot read image {file}: it is a pipe, socket or device, not a file; remove it"
        )


def _cause(file: Path, error: Exception) -> str:
    """What is wrong with a file that the decoders refuse, and the way out."""
    try:
        with file.open("rb") as handle:
            head = handle.read(512)
    except OSError as unread:
        return f"{unread.strerror}; make it readable"
    if not head:
        return "it is empty; remove it, or copy it again"
    for offset, magic, kind in _KINDS:
        if head[offset:].startswith(magic):
            return f"{kind} is not a format that is read here; convert it to PNG or JPEG"
    if file.suffix.lower() in _TEXTS or _is_text(head):
        return (
            "it is text, such as a caption or a table, and not an image; move it out of the "
            "folders of the classes"
        )
    if "truncated" in str(error).lower():
        return "it is cut short; copy it again, or remove it"
    return (
        "it is damaged, or of a format that is not read here; convert it to PNG or JPEG, repair it "
        "or remove it"
    )


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head[:-3].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
