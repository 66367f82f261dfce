"""One image file: its pixels, or a sentence that names the cause and the way out."""

import io
import os
import re
import socket
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from dpengine.data.files import FORMATS, MAX_PIXELS, decode


def gradient(mode="RGB"):
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    return Image.fromarray(pixels).convert(mode)


def refusal(file: Path, channels: int = 3) -> str:
    with pytest.raises(ValueError, match="image") as error:
        decode(file, channels)
    assert str(file) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_pixels_of_every_lossless_format_are_read(tmp_path, name):
    options = {"lossless": True} if name == "WEBP" else {}
    gradient().save(tmp_path / "named.wrongly", name, **options)
    pixels = decode(tmp_path / "named.wrongly", 3)
    assert np.array_equal(pixels, np.asarray(gradient()).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["JPEG", "AVIF"])
def test_lossy_formats_are_read(tmp_path, name):
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow reads no AVIF")
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "image", name)
    means = decode(tmp_path / "image", 3).mean((1, 2))
    assert np.abs(means - (200, 100, 50)).max() < 6


def test_grey_is_one_channel(tmp_path):
    gradient("L").save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", 1)[0], np.asarray(gradient("L")))


def test_images_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    gradient().save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(gradient()), -1)
    assert np.array_equal(decode(tmp_path / "a.png", 3), upright.transpose(2, 0, 1))


def test_the_photo_of_a_phones_file_of_several_pictures_is_read(tmp_path):
    photo, depth = Image.new("RGB", (16, 16), (200, 100, 50)), Image.new("RGB", (8, 8))
    photo.save(tmp_path / "IMG_1.JPG", "MPO", save_all=True, append_images=[depth])
    with Image.open(tmp_path / "IMG_1.JPG") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    pixels = decode(tmp_path / "IMG_1.JPG", 3)
    assert pixels.shape == (3, 16, 16)
    assert np.abs(pixels.mean((1, 2)) - (200, 100, 50)).max() < 6


def chunk(kind, content):
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_of_16_bits(color_type, channels):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0))
    rows = 4 * (b"\0" + 4 * channels * b"\x9c\x40")
    content = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tiff_of_16_bits():
    fields = {256: 4, 257: 4, 258: 200, 259: 1, 262: 2, 273: 300, 277: 3, 278: 4, 279: 96}
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in fields.items()
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4)
    depth = head.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)
    return depth.ljust(300, b"\0") + 96 * b"\x9c"


def saved(name, **options):
    content = io.BytesIO()
    gradient().save(content, name, **options)
    return bytearray(content.getvalue())


def jpeg_2000_of_16_bits(*, bare):
    content = saved("JPEG2000", no_jp2=bare)
    stream = content.find(b"\xff\x4f\xff\x51")
    content[stream + 42 : stream + 50 : 3] = bytes([15] * 3)
    if not bare:
        content[content.find(b"ihdr") + 14] = 15
    return content


def avif_of_10_bits():
    content = saved("AVIF")
    content[content.find(b"av1C") + 6] |= 0x40
    depth = content.find(b"pixi") + 9
    content[depth : depth + 3] = bytes([10] * 3)
    return content


DEEP = {
    "RGB.png": lambda: png_of_16_bits(2, 3),
    "RGBA.png": lambda: png_of_16_bits(6, 4),
    "LA.png": lambda: png_of_16_bits(4, 2),
    "L.png": lambda: png_of_16_bits(0, 1),
    "RGB.tiff": tiff_of_16_bits,
    "RGB.ppm": lambda: b"P6 4 4 65535\n" + 96 * b"\x9c",
    "text.ppm": lambda: b"P3 1 1 1023\n1 2 3\n",
    "RGB.jp2": lambda: jpeg_2000_of_16_bits(bare=False),
    "RGB.j2k": lambda: jpeg_2000_of_16_bits(bare=True),
    "RGB.avif": avif_of_10_bits,
}


@pytest.mark.parametrize("name", DEEP)
def test_no_image_of_more_than_8_bits_is_cut_to_8(tmp_path, name):
    """Pillow opens all but the grey ones as if they had 8 bits."""
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this build of Pillow reads no AVIF")
    (tmp_path / name).write_bytes(DEEP[name]())
    said = refusal(tmp_path / name)
    assert re.search("has (more than 8 bits per channel|pixels of mode).*of 8 bits per ch", said)
    assert "pixels of mode" not in said or name == "L.png"


SECRET = (10, 20, 30)


def transparent(mode, alpha):
    """A colour under an alpha of 0, 255 or between."""
    image = Image.new("RGBA", (8, 8), (*SECRET, alpha))
    return image.convert("LA") if mode == "LA" else image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF"])
def test_colours_that_are_not_seen_are_not_read(tmp_path, mode, name, channels):
    for alpha in (0, 128, 255):
        options = {"lossless": True, "exact": True} if name == "WEBP" else {}
        transparent(mode, alpha).save(tmp_path / "a", name, **options)
        pixels = decode(tmp_path / "a", channels).mean((1, 2))
        colour = np.array(transparent(mode, 255).convert("L" if channels == 1 else "RGB"))
        seen = 255 + (colour.reshape(64, -1).mean(0) - 255) * alpha / 255
        assert np.abs(pixels - seen).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "key"), [("RGB", SECRET), ("L", 17), ("P", 1), ("1", 0)])
def test_a_colour_that_stands_for_transparent_is_not_read(tmp_path, mode, key, channels):
    image = Image.new(mode, (8, 8), key)
    if mode == "P":
        image.putpalette([0, 0, 0, *SECRET])
    image.save(tmp_path / "a.png", transparency=key)
    assert (decode(tmp_path / "a.png", channels) == 255).all()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)


def container(brand):
    return b"\0\0\0\x18ftyp" + brand + bytes(300)


def zipped():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a.png", "x")
    return content.getvalue()


FOREIGN = {
    "IMG_1.HEIC": (HEIC, "HEIC.*convert it to PNG or JPEG"),
    "heic.jpg": (container(b"mif1"), "HEIC.*convert it to PNG or JPEG"),
    "raw.CR3": (container(b"crx "), "camera's raw file.*convert"),
    "film.mp4": (container(b"isom"), "video.*save the frames"),
    "film.mov": (container(b"qt  "), "video.*save the frames"),
    "film.webm": (b"\x1aE\xdf\xa3" + bytes(50), "video.*save the frames"),
    "film.avi": (b"RIFF\0\0\0\0AVI LIST", "video.*save the frames"),
    "a.jxl": (b"\xff\x0a" + bytes(50), "JPEG XL.*convert"),
    "b.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL.*convert"),
    "ct.dcm": (bytes(128) + b"DICM" + bytes(50), "DICOM.*scaled by a constant"),
    "ct.nii": (b"\\\x01" + bytes(342) + b"n+1\0", "NIfTI.*scaled by a constant"),
    "ct.nii.gz": (b"\x1f\x8b\x08" + bytes(50), "gzip.*unpack"),
    "sky.fits": (b"SIMPLE  =                    T", "FITS.*scaled by a constant"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "a.npy": (b"\x93NUMPY\x01\0" + bytes(50), r"NumPy.*\.npz"),
    "a.exr": (b"v/1\x01" + bytes(50), "OpenEXR"),
    "a.psd": (b"8BPS\0\x01" + bytes(50), "Photoshop.*convert"),
    "a.ico": (b"\0\0\x01\0\x01\0" + bytes(50), "icon.*convert"),
    "a.pdf": (b"%PDF-1.7\n", "PDF.*move it out"),
    "a.svg": (b'<?xml version="1.0"?><svg xmlns="http://x"/>', "SVG.*convert"),
    "a.jpg": (b"<!DOCTYPE html><html><body>404", "web page.*download"),
    "a.zip": (zipped(), "zip.*unpack"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0" + bytes(100), "Windows.*move it out"),
    "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS.*git lfs"),
    "1.txt": ("a photo of zoë, 5 years".encode(), "text and not an image.*captions.*move it out"),
    "metadata.jsonl": (b'{"file_name": "a.png"}\n', "text and not an image.*captions"),
    "utf16.txt": ("zoë".encode("utf-16"), "text and not an image"),
    "cut.txt": (("ë" * 4000).encode()[:4097], "text and not an image"),
    "empty.png": (b"", "it is empty.*copy it again"),
    "noise.png": (bytes(range(128, 256)) * 4, "not recognised; images are PNG, JPEG.*convert"),
    "cut.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG that is damaged or cut short.*repair"),
}


@pytest.mark.parametrize(("name", "content", "words"), [(n, *c) for n, c in FOREIGN.items()])
def test_what_is_no_image_is_named_with_the_way_out(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert re.search(words, refusal(tmp_path / name))
    assert "repair" not in refusal(tmp_path / name) or "damaged" in words


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_no_image_that_is_cut_short_is_read_in_part(tmp_path, name):
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow reads no AVIF")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Image.fromarray(noise).save(whole, name)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    assert "damaged or cut short; repair or remove it" in refusal(cut)


def test_cameras_raw_files_are_not_taken_for_the_thumbnail_within(tmp_path):
    gradient().save(tmp_path / "DSC_1.NEF", "TIFF")
    assert "camera's raw file" in refusal(tmp_path / "DSC_1.NEF")


def test_an_image_too_large_to_open_is_told(tmp_path, monkeypatch):
    """200 megapixels in half a kilobyte."""
    for width, height, refused_by in ((20_000, 10_000, None), (2**16, 2**16, 1)):
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
        (tmp_path / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")[:8])
        )
        if refused_by is None:
            # Libraries switch Pillow's own limit off.
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert f"more than {MAX_PIXELS:,} pixels; scale it down" in refusal(tmp_path / "a.png")
        monkeypatch.undo()


def test_an_image_half_as_large_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    gradient().save(tmp_path / "a.png")  # 48 pixels: Pillow warns, and pytest would raise
    assert decode(tmp_path / "a.png", 3).shape == (3, 6, 8)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """PostScript is a program, and Pillow would hand it to Ghostscript whatever its name."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: started.append(1))
    gradient().save(tmp_path / "a.png", "EPS")
    Image.open(tmp_path / "a.png").close()  # Pillow itself takes it for an image
    assert "PostScript file, which is not read; convert" in refusal(tmp_path / "a.png")
    assert not started


def test_the_formats_are_few_and_none_is_postscript():
    risky = {"EPS", "WMF", "IMT", "FITS", "GRIB", "HDF5", "BUFR", "MPEG", "PSD", "SPIDER"}
    assert not risky & set(FORMATS)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for name in ("pipe.png", "link.png", "device.png", "socket.png"):
            assert "pipe, socket or device" in refusal(tmp_path / name)


def test_a_file_that_becomes_a_pipe_before_it_is_open_is_not_waited_for(tmp_path, monkeypatch):
    file, stat = tmp_path / "a.png", os.stat
    gradient().save(file)

    def swap(path, **how):
        status = stat(path, **how)
        if path == file:
            file.unlink()
            os.mkfifo(file)
        return status

    monkeypatch.setattr("dpengine.data.files.os.stat", swap)
    assert "pipe, socket or device" in refusal(file)


def test_a_link_to_a_file_is_read(tmp_path):
    gradient().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert np.array_equal(decode(tmp_path / "a.png", 3), decode(tmp_path / "b.png", 3))


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    assert "link to a file that is not there" in refusal(tmp_path / "gone.png")
    assert "cannot be opened" in refusal(tmp_path / "round.png")


def test_a_folder_is_named(tmp_path):
    (tmp_path / "more").mkdir()
    assert "folder in the folder of a class; images must lie" in refusal(tmp_path / "more")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    gradient().save(tmp_path / "a.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dpengine.data.files.os.open", refuse)  # root may read everything
    assert "no permission to read it; change its permissions" in refusal(tmp_path / "a.png")


def test_running_out_of_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError

    gradient().save(tmp_path / "a.png")
    monkeypatch.setattr("dpengine.data.files.ImageOps.exif_transpose", refuse)
    with pytest.raises(MemoryError):
        decode(tmp_path / "a.png", 3)
