"""One image file: read as it is meant to be seen, or refused with its cause."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from dpengine.image_files import FORMATS, decode


def noise(size=(6, 5), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    file = tmp_path / "photo.png"
    noise().save(file, "EPS")
    with pytest.raises(ValueError, match=r"photo\.png: a PostScript file"):
        decode(file, 3)
    assert not started
    assert not set(FORMATS) & {"EPS", "WMF", "FPX", "MIC"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_told_and_not_waited_for(tmp_path, make):
    make(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: it is a (pipe|folder)"):
        decode(tmp_path / "x.png", 1)


@pytest.mark.parametrize(
    ("head", "cause"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300), "HEIC photo .* convert it to PNG"),
        (bytes(128) + b"DICM" + bytes(300), "DICOM file"),
        (b"%PDF-1.7\n" + bytes(50), "PDF"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "film"),
        (b"PK\x03\x04" + bytes(50), "ZIP"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"a photo of a cat", "it is text, such as a caption"),
        (b"", "it is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(5), "damaged|cut short"),
    ],
    ids=["heic", "dicom", "pdf", "jxl", "film", "zip", "lfs", "text", "empty", "png"],
)
def test_the_cause_is_named(tmp_path, head, cause):
    (tmp_path / "x.png").write_bytes(head)
    with pytest.raises(ValueError, match=rf"cannot read image .*x\.png: .*({cause})"):
        decode(tmp_path / "x.png", 3)


def test_the_thumbnail_of_a_raw_file_is_not_taken_for_it(tmp_path):
    noise().save(tmp_path / "x.DNG", "TIFF")
    with pytest.raises(ValueError, match=r"x\.DNG: a camera's raw file .* convert it"):
        decode(tmp_path / "x.DNG", 3)


def test_a_file_cut_short_is_told(tmp_path):
    file = tmp_path / "x.jpg"
    noise((200, 200)).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut short"):
        decode(file, 3)


def test_too_many_pixels_are_told_and_many_are_no_warning(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    noise((30, 30)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match="more than 800 pixels; scale it down"):
        decode(file, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file, 3).shape == (3, 30, 30)


def test_the_photo_of_a_phone_is_its_first_picture(tmp_path):
    file = tmp_path / "x.jpg"
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    red.save(file, "MPO", save_all=True, append_images=[blue], quality=95)
    with Image.open(file) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    pixels = decode(file, 3)
    assert pixels[0].min() > 250 and pixels[2].max() < 5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_seen_over_white(tmp_path, mode, channels):
    """The left half is transparent, with black underneath; the right half is black."""
    alpha = Image.new("L", (8, 4), 255)
    alpha.paste(0, (0, 0, 4, 4))
    if mode == "P":
        image, more = Image.new("P", (8, 4), 1), {"transparency": 0}
        image.putpalette([0, 0, 0] * 256)
        image.paste(0, (0, 0, 4, 4))
    elif mode == "RGB":
        image, more = Image.new("RGB", (8, 4), (0, 0, 0)), {"transparency": (1, 0, 0)}
        image.paste((1, 0, 0), (0, 0, 4, 4))
    else:
        image, more = Image.new(mode, (8, 4)), {}
        image.putalpha(alpha)
    image.save(tmp_path / "x.png", **more)
    pixels = decode(tmp_path / "x.png", channels)
    assert (pixels[:, :, :4] == 255).all() and (pixels[:, :, 4:] == 0).all()


def test_an_opaque_image_is_not_changed(tmp_path):
    image = noise()
    image.convert("RGBA").save(tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png", 3), np.asarray(image).transpose(2, 0, 1))
