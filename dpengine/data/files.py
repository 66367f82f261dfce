"""One image file of the data: its pixels, or why it cannot be read and what to do."""

import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may take a file for. Its reader of EPS, for one, starts a program on the content."""

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is read; Pillow's limit, beyond which a small file fills memory.
"""

_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_READ = "PNG, JPEG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000 or AVIF"
_CONVERT = "convert it to PNG or JPEG of 8 bits per channel"
_MOVE = "move it out of the data"
_SCALE = "save each picture as PNG of 8 bits, scaled by a constant that is the same for all images"
_RAW_SUFFIXES = frozenset((".dng", ".nef", ".cr2", ".arw", ".orf", ".rw2", ".pef", ".srw", ".raf"))

_SIGNATURES: list[tuple[int, bytes, str, str | None]] = [
    (0, b"\x89PNG\r\n", "a PNG", None),
    (0, b"\xff\xd8\xff", "a JPEG", None),
    (8, b"WEBP", "a WebP image", None),
    (0, b"GIF8", "a GIF", None),
    (4, b"ftypavi", "an AVIF image", None),
    (4, b"jP  ", "a JPEG 2000 image", None),
    *((4, b"ftyp" + brand, "a HEIC photo", _CONVERT) for brand in (b"he", b"mif1", b"msf1")),
    (4, b"ftypcrx", "a camera's raw file", _CONVERT),
    (4, b"ftyp", "a video", "save the frames that you mean as PNG"),
    (0, b"\x1aE\xdf\xa3", "a video", "save the frames that you mean as PNG"),
    (8, b"AVI ", "a video", "save the frames that you mean as PNG"),
    (4, b"JXL ", "a JPEG XL image", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (0, b"%!PS", "a PostScript file", _CONVERT),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file", _CONVERT),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (0, b"\0\0\x01\0", "an icon", _CONVERT),
    (0, b"v/1\x01", "an OpenEXR image", _SCALE),
    (0, b"#?RADIANCE", "a Radiance image", _SCALE),
    (128, b"DICM", "a DICOM file", _SCALE),
    (344, b"n+1\0", "a NIfTI volume", _SCALE),
    (344, b"ni1\0", "a NIfTI volume", _SCALE),
    (0, b"SIMPLE  =", "a FITS file", _SCALE),
    (0, b"\x89HDF", "an HDF5 file", _SCALE),
    (0, b"\x93NUMPY", "a NumPy array", "give arrays as one .npz file"),
    (0, b"%PDF", "a PDF document", _MOVE),
    (0, b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or " + _MOVE),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it, or " + _MOVE),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it, or " + _MOVE),
    (0, b"Rar!", "a RAR archive", "unpack it, or " + _MOVE),
    (257, b"ustar", "a tar archive", "unpack it, or " + _MOVE),
    (0, b"\xd0\xcf\x11\xe0", "a file of Windows or Office, such as Thumbs.db", _MOVE),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the image by `git lfs pull`"),
    (0, b"BM", "a BMP", None),
    (0, b"II*\0", "a TIFF", None),
    (0, b"MM\0*", "a TIFF", None),
]
"""Offset, bytes there, what such a file is, and the way out, None where it should have been read;
the first that fits counts."""


def decode(file: Path, channels: int) -> np.ndarray:
    """The pixels of ``file``, grey for one channel and RGB for three.  uint8 [channels, H, W]

    The image stands upright as its EXIF orientation says. What is transparent lies over white, as
    viewers show it: colours under it are not seen, and so not trained on. Of a phone's file of
    several pictures (MPO) the first is read, which is the photo. File names tell nothing of the
    format, apart from those of cameras' raw files.

    Raises ValueError that names ``file``, the cause and the way out: a file that is no image or in
    a format that is not in ``FORMATS``, damaged, larger than ``MAX_PIXELS``, of several frames or
    of more than 8 bits per channel, and whatever is no regular file.
    """
    with _open(file) as handle:
        if file.suffix.lower() in _RAW_SUFFIXES:
            _refuse(file, "it is a camera's raw file", _CONVERT)
        try:
            with warnings.catch_warnings():
                # Of Pillow's size limit, ours is the double, and of metadata that are not used.
                warnings.simplefilter("ignore")
                return _pixels(file, handle, channels)
        except Image.DecompressionBombError:
            _refuse(file, f"it has more than {MAX_PIXELS:,} pixels", "scale it down")
        except (_Unsuitable, MemoryError):
            raise
        except Exception:
            # A damaged file makes the decoders raise errors of many types.
            _refuse(file, *_diagnose(_head(handle)))


class _Unsuitable(ValueError):
    """A file that was understood, and is not to be read."""


def _refuse(file: Path, cause: str, way_out: str) -> NoReturn:
    raise _Unsuitable(f"cannot read image {file}: {cause}; {way_out}") from None


def _open(file: Path) -> BinaryIO:
    """Open a regular file, or a link to one.

    A pipe would keep the reader waiting for a writer, and opening a device may do something to it,
    so what ``file`` is comes first, and is looked at again when it is open.
    """
    try:
        _check_regular(file, os.stat(file).st_mode)
        handle = open(file, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        _refuse(file, "it is a link to a file that is not there", "mend or remove it")
    except PermissionError:
        _refuse(file, "you have no permission to read it", "change its permissions")
    except OSError as error:
        _refuse(file, f"it cannot be opened ({error.strerror})", "repair or remove it")
    try:
        _check_regular(file, os.fstat(handle.fileno()).st_mode)
    except _Unsuitable:
        handle.close()
        raise
    return handle


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(file: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        way_out = "images must lie directly in the folder of their class; move them up"
        _refuse(file, "it is a folder in the folder of a class", way_out)
    if not stat.S_ISREG(mode):
        _refuse(file, "it is a pipe, socket or device and no file", "remove it")


def _pixels(file: Path, handle: BinaryIO, channels: int) -> np.ndarray:
    Image.init()  # all of Pillow's readers, of which an old or a small build lacks some
    with Image.open(handle, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        n_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        kind = f"{n_frames} frames" if n_frames > 1 else None
        if image.mode not in _EIGHT_BIT_MODES:
            kind = f"pixels of mode {image.mode}"
        elif _is_deep(image, _head(handle)):
            kind = "more than 8 bits per channel"
        if kind is not None:
            raise _Unsuitable(
                f"image {file} has {kind}; save it as one frame of 8 bits per channel, scaled by a "
                "constant that is the same for all images"
            )
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(_over_white(upright).convert("L" if channels == 1 else "RGB"))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _is_deep(image: Image.Image, head: bytes) -> bool:
    """Whether ``image`` has more than 8 bits per channel, which Pillow cuts off from colour unsaid.

    head: the first bytes of its file. (PNG: ISO 15948, 11.2.2; JPEG 2000: ISO 15444-1, A.5.1 and
    I.5.3.1; AV1 in ISOBMFF, 2.3.)
    """
    if image.format == "PNG":
        return head[24] > 8
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8  # BitsPerSample
    if image.format == "PPM":
        args = image.tile[0].args
        return isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255
    if image.format == "JPEG2000":
        # In the header of a file, or the first marker of a stream without one.
        place = 42 if head.startswith(b"\xff\x4f\xff\x51") else head.find(b"ihdr") + 14
        return head[place] & 0x7F > 7
    if image.format == "AVIF":
        _, found, codec = head.partition(b"av1C")
        return bool(found) and codec[2] & 0x40 > 0
    return False


def _head(handle: BinaryIO) -> bytes:
    place = handle.tell()
    handle.seek(0)
    head = handle.read(2**16)  # of AVIF a colour profile may stand before what tells the depth
    handle.seek(place)
    return head


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _diagnose(head: bytes) -> tuple[str, str]:
    """What a file is that begins with ``head`` and is no readable image, and the way out."""
    if not head:
        return "it is empty", "copy it again or remove it"
    for offset, signature, name, way_out in _SIGNATURES:
        if head.startswith(signature, offset):
            if way_out is None:
                return f"it is {name} that is damaged or cut short", "repair or remove it"
            return f"it is {name}, which is not read", way_out
    if (text := _as_text(head)) is None:
        return f"its format is not recognised; images are {_READ}", f"{_CONVERT} or remove it"
    if "<svg" in text:
        return "it is an SVG drawing, which is not read", _CONVERT
    if "<html" in text or "<!doctype" in text:
        return "it is a web page and no image", "download the image again"
    return (
        "it is text and not an image; captions and tables beside images are not used",
        _MOVE,
    )


def _as_text(head: bytes) -> str | None:
    """``head`` in lower case where it is text; its last character may be cut off."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    for end in range(len(head), max(len(head) - 4, 0), -1):
        try:
            text = head[:end].decode(encoding)
        except UnicodeDecodeError:
            continue
        is_text = all(character.isprintable() or character.isspace() for character in text)
        return text.lower() if is_text else None
    return None
