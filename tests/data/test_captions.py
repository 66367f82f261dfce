"""Captions of private images, by a table or by texts: all or none, and none is shown."""

import json

import numpy as np
import pytest
from PIL import Image

from dpengine.data import captions
from dpengine.data import records as data

TEXT = "patient 4711, left lung"


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a folder of its own."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "more/c.png")):
        Image.new("L", (8, 8), 40 * number).save(root / name)
    (root / ".hidden").write_text("x")
    return root


ROWS = [
    {"file_name": "b.png", "text": "two\u2028lines"},
    {"file_name": "more/c.png", "text": TEXT},
    {"file_name": "a.jpg", "text": ""},
]


def jsonl(folder, rows=ROWS):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def csv(folder, rows=ROWS):
    lines = [f'{row["file_name"]},"{row["text"]}"' for row in rows]
    text = "\ufefffile_name,text\r\n" + "\r\n".join(lines)
    (folder / "metadata.csv").write_text(text, encoding="utf-8", newline="")


def texts(folder, rows=ROWS):
    for row in rows:
        file = (folder / row["file_name"]).with_suffix(".txt")
        file.write_text(row["text"] + "\n", encoding="utf-8")


@pytest.mark.parametrize("write", [jsonl, csv, texts])
def test_each_image_has_its_own_caption(folder, write):
    write(folder)
    found = captions.read(folder)
    names = [file.relative_to(folder).as_posix() for file in found.files]
    assert dict(zip(names, found.captions, strict=True)) == {
        "a.jpg": "",
        "b.png": "two\u2028lines",
        "more/c.png": TEXT,
    }
    records = data.load(str(folder), None, 1, 8)
    assert records.captions == found.captions and len(records) == 3
    assert [round(float(image.mean() + 1) * 127.5) for image in records.images] == [40, 0, 80]
    assert not records.has_units


def test_whose_an_image_is_stands_in_either_table(folder):
    of_persons = [{**row, "unit_id": unit} for row, unit in zip(ROWS, (7, "x", "7"), strict=True)]
    jsonl(folder, of_persons)
    first = data.load(str(folder), None, 1, 8)
    jsonl(folder)
    units = "file_name,unit_id\na.jpg,7\nb.png,7\nmore/c.png,x\n"
    (folder / "units.csv").write_text(units)
    second = data.load(str(folder), None, 1, 8)
    for records in (first, second):
        assert len(np.unique(records.unit_ids)) == records.n_units == 2
        assert records.unit_ids[0] == records.unit_ids[1]
    jsonl(folder, of_persons)
    with pytest.raises(ValueError, match="both name units"):
        data.load(str(folder), None, 1, 8)


def drop(folder):
    jsonl(folder, ROWS[:2])


def twice(folder):
    jsonl(folder, [*ROWS, ROWS[0]])


def unknown(folder):
    jsonl(folder, [*ROWS, {"file_name": "../secret.png", "text": TEXT}])


def without_text(folder):
    jsonl(folder, [*ROWS[:2], {"file_name": "a.jpg", "caption": TEXT}])


def number(folder):
    jsonl(folder, [*ROWS[:2], {"file_name": "a.jpg", "text": 5}])


def no_json(folder):
    (folder / "metadata.jsonl").write_text(f"{{{TEXT}")


def no_columns(folder):
    (folder / "metadata.csv").write_text(f"file,caption\nb.png,{TEXT}")


def latin(folder):
    (folder / "metadata.csv").write_bytes(f"file_name,text\nb.png,{TEXT}\xe9".encode("latin-1"))


def both(folder):
    jsonl(folder)
    csv(folder)


def persons(folder):
    jsonl(folder, [{**row, "Patient-Nr": 1} for row in ROWS])


def half_of_the_units(folder):
    jsonl(folder, [{**ROWS[0], "unit_id": 1}, *ROWS[1:]])


def no_text_beside(folder):
    texts(folder, ROWS[1:])


def no_image_beside(folder):
    texts(folder)
    (folder / "d.txt").write_text(TEXT)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "does not list a.jpg; every image needs a text"),
        (twice, "line 4: b.png is listed twice"),
        (unknown, "line 4: ../secret.png is no file of the folder"),
        (without_text, "line 3: needs the texts file_name and text"),
        (number, "line 3: needs the texts file_name and text"),
        (no_json, "line 1: is no JSON"),
        (no_columns, "must have the columns file_name and text"),
        (latin, "must be text in UTF-8"),
        (both, "must hold one of metadata.jsonl and metadata.csv"),
        (persons, "a column 'Patient-Nr', which is not read"),
        (half_of_the_units, "gives a unit_id to some images"),
        (no_text_beside, "b.png has no caption"),
        (no_image_beside, "d.txt is the caption of no image"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_named_and_no_caption_shown(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError) as error:
        data.load(str(folder), None, 1, 8)
    assert message in str(error.value)
    assert TEXT not in str(error.value) and "4711" not in repr(error.value.__cause__)


def test_no_repr_shows_a_caption(folder):
    jsonl(folder)
    assert repr(captions.read(folder)) == "Captioned()"
    assert TEXT not in repr(data.load(str(folder), None, 1, 8))
