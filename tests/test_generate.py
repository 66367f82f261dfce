"""Drawing images from released weights: reproducible, even over classes, clear when it cannot."""

import numpy as np
import pytest

from dpengine import finetune, generate
from dpengine.data import records as data


def test_the_base_model_draws_even_classes_that_data_can_read(tmp_path):
    file = tmp_path / "images.npz"
    command = f"--base default --num 25 --sampler-steps 2 --output {file}"
    assert generate.main(command.split()) == 0
    with np.load(file) as drawn:
        assert drawn["images"].shape == (25, 8, 8)
        assert drawn["images"].dtype == np.uint8
        assert np.bincount(drawn["labels"]).tolist() == [3] * 5 + [2] * 5
    assert len(data.load(str(file), [str(d) for d in range(10)], 1, 8)) == 25


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--output a.npz", "either --run DIR or --base"),
        ("--output a.npz --run x --base default", "either --run DIR or --base"),
        ("--output a.npz --run missing", "not the folder of a run"),
        ("--output a.png --base default", "must end in .npz"),
        ("--output missing/a.npz --base default", "does not exist"),
        ("--output a.npz --base default --num 0", "num must be"),
        ("--output a.npz --base missing", "is no diffusers pipeline"),
        ("--output a.npz --base default --num 100000000", "num must be at most"),
        ("--output a.npz --base default --seed 99999999999999999999", "seed must lie"),
        ("--output /proc/a.npz --base default", "output folder '/proc' takes no file"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert generate.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_there_is_not_replaced(tmp_path, capsys, kind):
    file = tmp_path / "mine.npz"
    if kind == "file":
        file.write_bytes(b"my data")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(tmp_path / "later")
    command = f"--base default --num 3 --sampler-steps 2 --output {file}"
    assert generate.main(command.split()) == 2
    assert "exists; name a new file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]
    assert kind != "file" or file.read_bytes() == b"my data"


def test_what_came_while_images_were_drawn_is_not_replaced(tmp_path, monkeypatch):
    file = tmp_path / "both.npz"
    draw_images = generate.draw_images

    def draw_and_lose(*args, **kwargs):
        file.write_bytes(b"the other's")
        return draw_images(*args, **kwargs)

    monkeypatch.setattr(generate, "draw_images", draw_and_lose)
    command = f"--base default --num 3 --sampler-steps 2 --output {file}"
    assert generate.main(command.split()) == 2
    assert file.read_bytes() == b"the other's"


@pytest.mark.parametrize("content", [None, b"x" * 100])
def test_an_adapter_that_does_not_load_is_named(arguments, run, capsys, tmp_path, content):
    assert finetune.main(arguments) == 0
    run.adapter.unlink()
    if content is not None:
        run.adapter.write_bytes(content)
    assert generate.main(f"--run {run.path} --num 3 --output {tmp_path / 'a.npz'}".split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(run.adapter) in error
