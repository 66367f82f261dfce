"""Reading private records, and refusing what cannot be read."""

import contextlib
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dpengine.data import records as data

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture
def save_npz(tmp_path):
    def save(images, labels, names=("images", "labels"), **others):
        path = tmp_path / "private.npz"
        np.savez(path, **{names[0]: images, names[1]: labels}, **others)
        return str(path)

    return save


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, two grey images each of one value; class 7 comes before class 3 by size."""
    for name, value in (("3", 30), ("7", 70)):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = np.full((12, 16), value + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_digits_are_the_training_split_scaled_to_the_unit_range():
    pixels, target = load_digits(return_X_y=True)
    x, _, y, _ = train_test_split(pixels, target, test_size=360, stratify=target, random_state=0)
    records = data.load("digits", NAMES, 1, 8)
    assert records.images.shape == (1437, 1, 8, 8)
    np.testing.assert_array_equal(records.images.flatten(1).numpy(), (x / 8 - 1).astype(np.float32))
    np.testing.assert_array_equal(records.labels.numpy(), y)


def test_held_out_digits_are_never_trained_on():
    train = data.load("digits", NAMES, 1, 8)
    held_out = data.held_out_digits()
    assert len(held_out) == 360
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train")])
def test_npz_pixels_span_minus_one_to_one(save_npz, names):
    images = np.zeros((2, 8, 8), np.uint8)
    images[1] = 255
    records = data.load(save_npz(images, np.array([3, 4]), names), NAMES, 1, 8)
    assert records.images[0].unique().item() == -1
    assert records.images[1].unique().item() == 1
    assert records.labels.tolist() == [3, 4]


def test_npz_colour_images_keep_their_channels(save_npz):
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[..., 1] = 255
    records = data.load(save_npz(images, np.array([0])), NAMES, 3, 8)
    assert records.images.mean((0, 2, 3)).tolist() == [-1, 1, -1]


def test_colour_becomes_grey_as_pillow_does_it(save_npz):
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    records = data.load(save_npz(images, np.array([0])), NAMES, 1, 8)
    grey = np.asarray(Image.fromarray(images[0]).convert("L"))
    assert np.abs((records.images[0, 0].numpy() + 1) * 127.5 - grey).max() <= 1


def test_one_image_does_not_depend_on_the_others(save_npz):
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 12), np.uint8)
    together = data.load(save_npz(images, np.zeros(5, int)), NAMES, 1, 8).images
    alone = data.load(save_npz(images[3:4], np.zeros(1, int)), NAMES, 1, 8).images
    assert torch.equal(together[3:4], alone)


def test_resizing_keeps_the_mean_of_the_centred_square(save_npz):
    images = np.zeros((1, 16, 32), np.uint8)
    images[:, :, 8:24] = 200
    records = data.load(save_npz(images, np.array([0])), NAMES, 1, 8)
    torch.testing.assert_close(records.images, torch.full((1, 1, 8, 8), 200 / 127.5 - 1))


def test_folder_takes_classes_from_sub_folders(image_folder):
    records = data.load(str(image_folder), NAMES, 1, 8)
    assert records.labels.tolist() == [3, 3, 7, 7]
    values = ((records.images.mean((1, 2, 3)) + 1) * 127.5).round().tolist()
    assert values == [30, 31, 70, 71]


def test_folder_of_grey_images_for_a_colour_model(image_folder):
    assert data.load(str(image_folder), NAMES, 3, 8).images.shape == (4, 3, 8, 8)


def test_an_unreadable_image_is_named(image_folder):
    bad = image_folder / "3" / "broken.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read image .*3/broken\.png"):
        data.load(str(image_folder), NAMES, 1, 8)


def test_a_truncated_image_is_named(image_folder):
    file = image_folder / "7" / "0.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot read image .*7/0\.png"):
        data.load(str(image_folder), NAMES, 1, 8)


def test_a_broken_link_is_named(image_folder):
    (image_folder / "3" / "gone.png").symlink_to(image_folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"cannot read image .*3/gone\.png"):
        data.load(str(image_folder), NAMES, 1, 8)


def test_a_folder_within_a_class_is_named(image_folder):
    (image_folder / "3" / "more").mkdir()
    with pytest.raises(ValueError, match=r"cannot read image .*3/more"):
        data.load(str(image_folder), NAMES, 1, 8)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(image_folder, mode):
    """Pillow would cut them at 255, and train on white squares."""
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(image_folder / "3" / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff has pixels of mode .*8 bits"):
        data.load(str(image_folder), NAMES, 1, 8)


def test_images_of_several_frames_are_refused(image_folder):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255)]
    frames[0].save(image_folder / "3" / "film.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"film\.gif has 2 frames"):
        data.load(str(image_folder), NAMES, 1, 8)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_is_read(tmp_path, mode):
    (tmp_path / "5").mkdir()
    image = Image.fromarray(np.full((8, 8), 255, np.uint8)).convert("RGB").convert(mode)
    image.save(tmp_path / "5" / ("white.tiff" if mode == "CMYK" else "white.png"))
    assert data.load(str(tmp_path), NAMES, 1, 8).images.min() > 0.98


@pytest.mark.parametrize(
    ("folder", "hint"),
    [
        ("40_cat", "images are not repeated here, so name it cat"),
        ("Cat", "name it cat if that is meant"),
        ("cat ", "name it cat if that is meant"),
        ("train/cat", "in which the classes' folders are; give .*train as the data"),
        ("bird", r"got bird$"),
    ],
)
def test_a_folder_of_another_layout_is_refused_with_what_is_meant(tmp_path, folder, hint):
    (tmp_path / folder).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    with pytest.raises(ValueError, match=rf"named as in \['cat', 'dog'\].*{hint}"):
        data.load(str(tmp_path), ["cat", "dog"], 1, 8)


def test_a_thousand_classes_are_not_listed(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="and 980 more; got x") as refusal:
        data.load(str(tmp_path), [str(n) for n in range(1000)], 1, 8)
    assert len(str(refusal.value)) < 500


def test_a_file_named_as_a_class_is_refused(tmp_path):
    (tmp_path / "5").write_bytes(b"")
    with pytest.raises(ValueError, match="got 5, which is no folder"):
        data.load(str(tmp_path), NAMES, 1, 8)


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "symbolic"])
def test_one_file_under_two_names_is_one_units(image_folder, link):
    link(image_folder / "3" / "0.png", image_folder / "7" / "again.png")
    with pytest.raises(
        ValueError, match=r"3/0\.png and .*7/again\.png are one file under two names"
    ):
        data.load(str(image_folder), NAMES, 1, 8)
    rows = "3/0.png,{}\n3/1.png,b\n7/0.png,b\n7/1.png,b\n7/again.png,a\n"
    table = "file_name,unit_id\n" + rows
    assert len(load_units(image_folder, table.format("a"))) == 5
    with pytest.raises(ValueError, match=r"one file under two names.*one unit_id in units\.csv"):
        load_units(image_folder, table.format("c"))


def test_the_same_picture_of_two_units_is_told(image_folder, save_npz):
    """To the data holder, who knows whether it is one person's; not how many there are."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    for number in (0, 1, 0):
        kind = "png" if not (image_folder / "3" / f"n{number}.png").exists() else "bmp"
        Image.fromarray(noise[number]).save(image_folder / "3" / f"n{number}.{kind}")
    said = r"'3/n0\.bmp' and '3/n0\.png' are the same picture.*unit_id"
    with pytest.warns(UserWarning, match=said):
        assert len(data.load(str(image_folder), NAMES, 1, 8)) == 7
    twice = noise[[0, 1, 0]]
    with pytest.warns(UserWarning, match="'image 0' and 'image 2' are the same picture"):
        data.load(save_npz(twice, np.arange(3)), NAMES, 1, 8)
    with pytest.warns(UserWarning, match="'image 0' and 'image 2'"):
        data.load(save_npz(twice, np.arange(3), unit_ids=np.arange(3)), NAMES, 1, 8)
    data.load(save_npz(twice, np.arange(3), unit_ids=np.array([1, 2, 1])), NAMES, 1, 8)
    data.load(save_npz(noise, np.arange(3)), NAMES, 1, 8)
    data.load(save_npz(0 * noise, np.arange(3)), NAMES, 1, 8)


def test_a_folder_of_another_class_is_refused(image_folder):
    (image_folder / "cat").mkdir()
    with pytest.raises(ValueError, match="cat"):
        data.load(str(image_folder), NAMES, 1, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_with_channels_first_is_read(save_npz, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 10, channels), np.uint8)
    last = data.load(save_npz(images, np.arange(2)), NAMES, channels, 8)
    first = data.load(save_npz(images.transpose(0, 3, 1, 2), np.arange(2)), NAMES, channels, 8)
    assert torch.equal(first.images, last.images)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_the_classes_is_refused(save_npz, label):
    path = save_npz(np.zeros((2, 8, 8), np.uint8), np.array([0, label]))
    with pytest.raises(ValueError, match=f"label outside .* 10 classes.*: {label}"):
        data.load(path, NAMES, 1, 8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 8), np.uint8), np.zeros(2, int), "uint8"),
        (np.zeros((2, 8, 8, 2), np.uint8), np.zeros(2, int), "C of 1 or 3"),
        (np.zeros((2, 4, 8, 8), np.uint8), np.zeros(2, int), r"got uint8 \[N, 4, 8, 8\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, int), r"got uint8 \[N, 8, 8, 4\]"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(3, int), "one for each image.* another N"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 10), int), r"got int64 \[N, 10\]"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2), "whole numbers"),
        (np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), "holds no images"),
        (np.zeros((2, 0, 8), np.uint8), np.zeros(2, int), "at least one pixel"),
    ],
    ids=[
        "float",
        "flat",
        "two-channels",
        "alpha-first",
        "alpha-last",
        "counts",
        "one-hot",
        "float-labels",
        "empty",
        "no-pixels",
    ],
)
def test_npz_of_another_form_is_refused(save_npz, images, labels, message):
    with pytest.raises(ValueError, match=message):
        data.load(save_npz(images, labels), NAMES, 1, 8)


def test_no_refusal_tells_how_many_records_there_are(save_npz):
    n = 137
    images, labels = np.zeros((n, 8, 8), np.uint8), np.zeros(n, int)
    for bad in (
        {"images": images.astype(float), "labels": labels},
        {"images": images[..., None, None], "labels": labels},
        {"images": images, "labels": labels[1:]},
        {"images": images, "labels": labels.astype(float)},
        {"images": images, "labels": labels, "unit_ids": labels[1:]},
        {"images": images, "labels": labels - 1},
    ):
        path = save_npz(**bad)
        with pytest.raises(ValueError, match=r"must be|label") as refusal:
            data.load(path, NAMES, 1, 8)
        assert "13" not in str(refusal.value).replace(path, "")


def test_npz_with_other_arrays_is_refused(save_npz):
    path = save_npz(np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), ("x", "y"))
    with pytest.raises(ValueError, match="'images' and 'labels'"):
        data.load(path, NAMES, 1, 8)


def test_no_flipped_byte_gives_another_error(save_npz):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    path = Path(save_npz(images, np.zeros(4, int)))
    np.savez_compressed(path, images=images, labels=np.zeros(4, int))
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
        )
        with contextlib.suppress(ValueError):
            data.load(str(path), NAMES, 1, 8)


@pytest.mark.parametrize("name", ["broken.npz", "missing.npz", "missing-folder"])
def test_what_is_no_data_is_refused(tmp_path, name):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=name):
        data.load(str(tmp_path / name), NAMES, 1, 8)


def test_records_show_nothing_of_themselves():
    records = data.load("digits", NAMES, 1, 8)
    units = data.Records(records.images, records.labels, np.arange(1437) // 2)
    assert repr(records) == repr(units) == "Records(private)"


BLANK = (np.zeros((5, 8, 8), np.uint8), np.zeros(5, int))


def same_unit(unit_ids):
    """Bool [N, N]: which pairs of records are said to be one unit's."""
    return np.equal.outer(unit_ids, unit_ids)


def load_units(tmp_path, text, encoding="utf-8"):
    (tmp_path / "units.csv").write_text(text, encoding=encoding)
    return data.load(str(tmp_path), NAMES, 1, 8).unit_ids


@pytest.mark.parametrize(
    "unit_ids",
    [
        np.array([7, -2, 7, 900, 7]),
        np.array([2**64 - 1, 0, 2**64 - 1, 2**63, 2**64 - 1], np.uint64),
        np.array([7.0, -2.0, 7.0, 900.0, 7.0]),
        np.array(["zoe", "al", "zoe", "bo ", "zoe"]),
        np.array([b"zoe", b"al", b"zoe", b"bo", b"zoe"]),
    ],
    ids=["int64", "uint64", "float", "str", "bytes"],
)
@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train")])
def test_npz_unit_ids_of_any_kind_become_dense_numbers(save_npz, unit_ids, names):
    records = data.load(save_npz(*BLANK, names, unit_ids=unit_ids), NAMES, 1, 8)
    assert records.unit_ids.dtype == np.int64
    assert sorted(set(records.unit_ids.tolist())) == [0, 1, 2]
    assert np.array_equal(same_unit(records.unit_ids), same_unit(unit_ids))
    assert (len(records), records.n_units) == (5, 3)


def test_without_unit_ids_each_record_is_a_unit(save_npz, image_folder):
    for source in ("digits", save_npz(*BLANK), str(image_folder)):
        if source == str(image_folder):
            (image_folder / "private.npz").unlink()
        records = data.load(source, NAMES, 1, 8)
        assert records.unit_ids is None
        assert records.n_units == len(records)


@pytest.mark.parametrize(
    "unit_ids",
    [np.zeros(4, int), np.zeros((5, 1), int), np.full(5, 0.5), np.zeros(5, bool), np.array(3)],
    ids=["too-few", "column", "fractions", "bools", "one-number"],
)
def test_npz_unit_ids_of_another_form_are_refused(save_npz, unit_ids):
    with pytest.raises(ValueError, match=r"unit_ids in .*(one for each|whole numbers or texts)"):
        data.load(save_npz(*BLANK, unit_ids=unit_ids), NAMES, 1, 8)


@pytest.mark.parametrize(
    ("unit_ids", "words"),
    [
        (["Al", "al", "bo", "bo", "bo"], "record 0 and record 1 ids that may be one unit"),
        ([1, 0.5, 2, 2, 2], "at record 1, must hold whole numbers"),
        ([1, np.nan, 2, 2, 2], "at record 1, .* missing id"),
        (["al", "", "bo", "bo", "bo"], "at record 1, must name a unit for every record"),
    ],
)
def test_npz_unit_ids_that_are_doubtful_are_refused(save_npz, unit_ids, words):
    path = save_npz(*BLANK, unit_ids=np.array(unit_ids))
    with pytest.raises(ValueError, match=words) as refusal:
        data.load(path, NAMES, 1, 8)
    assert path in str(refusal.value)


@pytest.mark.parametrize("name", ["unit_id", "Unit_IDs", "patient", "person_ids", "subjects"])
def test_persons_under_another_name_are_not_passed_over(save_npz, name):
    with pytest.raises(ValueError, match=f"an array '{name}', which is not read.*'unit_ids'"):
        data.load(save_npz(*BLANK, **{name: np.arange(5)}), NAMES, 1, 8)


def test_npz_unit_ids_that_are_python_objects_are_refused(save_npz):
    with pytest.raises(ValueError, match="'unit_ids', none of them of Python objects"):
        data.load(save_npz(*BLANK, unit_ids=np.array(list("abcde"), object)), NAMES, 1, 8)


def test_no_flipped_byte_of_unit_ids_gives_another_error(save_npz):
    path = Path(save_npz(*BLANK, unit_ids=np.array(list("ababc"))))
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
        )
        with contextlib.suppress(ValueError):
            data.load(str(path), NAMES, 1, 8)


def test_folder_takes_units_from_a_table(image_folder):
    """In the order of the images, whatever the order of the table."""
    table = "file_name,unit_id\n7/1.png,zoe\n3/0.png,zoe\n3/1.png,al\n7/0.png,bo\n"
    unit_ids = load_units(image_folder, table)
    assert unit_ids.dtype == np.int64
    assert np.array_equal(same_unit(unit_ids), same_unit(["zoe", "al", "bo", "zoe"]))
    assert set(unit_ids) == {0, 1, 2}


@pytest.mark.parametrize(
    ("newline", "encoding"), [("\n", "utf-8-sig"), ("\r\n", "utf-8"), ("\n\n", "utf-8")]
)
def test_tables_as_spreadsheets_write_them_are_read(image_folder, newline, encoding):
    lines = ['"3/0.png","Ström, Åsa"', "./3/1.png,al", "7/0.png, al ", "7/1.png,bo"]
    text = newline.join(["file_name,unit_id", *lines])
    unit_ids = load_units(image_folder, text, encoding)
    assert np.array_equal(same_unit(unit_ids), same_unit([0, 1, 1, 2]))


WHOLE = "file_name,unit_id\n3/0.png,a\n3/1.png,a\n7/0.png,b\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE, r"units\.csv does not list 7/1\.png"),
        (WHOLE + "7/1.png,b\n7/0.png,b\n", r"lists 7/0\.png twice"),
        (WHOLE + "7/1.png,b\n./3/0.png,a\n", r"lists 3/0\.png twice"),
        (WHOLE + "7/1.png,b\n9/0.png,b\n", r"lists 9/0\.png, which is no image"),
        (WHOLE + "7/1.png\n", r"one unit_id for '7/1\.png'"),
        (WHOLE + "7/1.png, \n", r"one unit_id for '7/1\.png'"),
        (WHOLE + "7/1.png,b,c\n", r"one unit_id for '7/1\.png'"),
        (WHOLE.replace("file_name", "file"), "first line .* must be file_name,unit_id"),
        ("", "first line .* must be file_name,unit_id"),
        (WHOLE + '"7/1.png,b\n', "must be CSV text in UTF-8"),
    ],
)
def test_a_table_that_does_not_give_every_image_one_unit_is_refused(image_folder, text, message):
    with pytest.raises(ValueError, match=message):
        load_units(image_folder, text)


def test_a_table_in_another_encoding_is_refused(image_folder):
    with pytest.raises(ValueError, match=r"units\.csv: it must be CSV text in UTF-8"):
        load_units(image_folder, WHOLE + "7/1.png,Åsa\n", "latin-1")


def test_refusing_a_table_does_not_tell_whose_an_image_is(image_folder):
    for text in (WHOLE.replace(",b", ",Mayer"), WHOLE + "7/1.png,Mayer,Anna\n", "3/0.png,Mayer"):
        with pytest.raises(ValueError, match="units") as refusal:
            load_units(image_folder, text)
        assert "Mayer" not in str(refusal.value)


def test_a_second_table_is_refused(image_folder):
    (image_folder / "Units.csv").write_text(WHOLE)
    with pytest.raises(ValueError, match=r"must hold one units\.csv, got .*Units\.csv"):
        load_units(image_folder, WHOLE + "7/1.png,b\n")


@pytest.mark.parametrize("name", ["Units.csv", "UNITS.CSV"])
def test_a_table_in_capitals_is_read(image_folder, name):
    (image_folder / name).write_text(WHOLE + "7/1.png,b\n")
    unit_ids = data.load(str(image_folder), NAMES, 1, 8).unit_ids
    assert np.array_equal(same_unit(unit_ids), same_unit(list("aabb")))


@pytest.mark.parametrize("name", ["units.csv.txt", "units.xlsx", "unit.csv", "metadata.jsonl"])
def test_a_table_of_another_name_is_not_passed_over(image_folder, name):
    (image_folder / name).write_text(WHOLE + "7/1.png,b\n")
    with pytest.raises(ValueError, match=rf"got {name}, which is no folder.*units\.csv"):
        data.load(str(image_folder), NAMES, 1, 8)


def test_a_table_among_the_images_of_a_class_is_not_passed_over(image_folder):
    (image_folder / "3" / "units.csv").write_text(WHOLE)
    with pytest.raises(ValueError, match=r"units\.csv.* beside the folders of the classes"):
        data.load(str(image_folder), NAMES, 1, 8)


@pytest.mark.parametrize(
    "text",
    [
        "file_name,unit_id\n3\\0.png,a\n3\\1.png,a\n7\\0.png,b\n.\\7\\1.png,b\n",
        "File_Name, Unit_ID\n3/0.png,7\n3/1.png,7.0\n7/0.png,8\n7/1.png,8\n,\n",
    ],
    ids=["backslashes", "capitals"],
)
def test_tables_of_other_systems_are_read(image_folder, text):
    assert np.array_equal(same_unit(load_units(image_folder, text)), same_unit(list("aabb")))


def test_ids_of_a_table_that_may_be_one_persons_are_refused(image_folder):
    with pytest.raises(ValueError, match=r"units\.csv gives 7/0\.png and 7/1\.png ids that may"):
        load_units(image_folder, WHOLE + "7/1.png,B\n")


FORMS = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("on_disk", FORMS, ids=["NFC", "NFD"])
@pytest.mark.parametrize("in_table", FORMS, ids=["NFC", "NFD"])
@pytest.mark.parametrize("of_class", FORMS, ids=["NFC", "NFD"])
def test_names_are_the_same_in_every_unicode_form(tmp_path, on_disk, in_table, of_class):
    (tmp_path / on_disk).mkdir()
    for number in range(2):
        Image.new("L", (8, 8), number).save(tmp_path / on_disk / f"{on_disk}{number}.png")
    rows = [f"{in_table}/{in_table}{n}.png,{FORMS[n]}\n" for n in range(2)]
    (tmp_path / "units.csv").write_text("file_name,unit_id\n" + "".join(rows), encoding="utf-8")
    records = data.load(str(tmp_path), ["another", of_class], 1, 8)
    assert records.labels.tolist() == [1, 1]
    assert records.n_units == 1


def test_a_table_over_two_images_whose_names_look_the_same_is_refused(tmp_path):
    (tmp_path / "5").mkdir()
    for number, form in enumerate(FORMS):
        Image.new("L", (8, 8), number).save(tmp_path / "5" / f"{form}.png")
    assert len(data.load(str(tmp_path), NAMES, 1, 8)) == 2
    rows = "".join(f"5/{form}.png,{number}\n" for number, form in enumerate(FORMS))
    (tmp_path / "units.csv").write_text("file_name,unit_id\n" + rows, encoding="utf-8")
    with pytest.raises(ValueError, match=r"two images .* look the same, .*; rename one"):
        data.load(str(tmp_path), NAMES, 1, 8)


def test_a_class_may_be_named_as_the_table_is(image_folder):
    (image_folder / "3").rename(image_folder / "units.csv")
    records = data.load(str(image_folder), ["units.csv", "7"], 1, 8)
    assert records.labels.tolist() == [1, 1, 0, 0]
    assert records.unit_ids is None


def test_paths_of_windows_and_other_forms_of_names_are_read(image_folder):
    (image_folder / "3").rename(image_folder / "e\u0301")
    table = (WHOLE + "7/1.png,b\n").replace("3/", "\u00e9\\").replace("7/", "7\\")
    (image_folder / "units.csv").write_text(table, encoding="utf-8")
    records = data.load(str(image_folder), ["7", "\u00e9"], 1, 8)
    assert records.labels.tolist() == [0, 0, 1, 1]
    assert records.n_units == 2


def test_labels_in_a_column_and_a_suffix_in_capitals_are_read(save_npz):
    images, labels = BLANK
    path = Path(save_npz(images, labels[:, None]))
    assert data.load(str(path.rename(path.with_suffix(".NPZ"))), NAMES, 1, 8).labels.ndim == 1
