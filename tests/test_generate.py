"""Drawing images from released weights: reproducible, even over classes, clear when it cannot."""

import numpy as np
import pytest
import torch

from dpengine import data, generate
from dpengine.base import load_base


def test_the_base_model_draws_even_classes_that_data_can_read(tmp_path):
    file = tmp_path / "images.npz"
    command = f"--base default --num 25 --sampler-steps 2 --output {file}"
    assert generate.main(command.split()) == 0
    with np.load(file) as drawn:
        assert drawn["images"].shape == (25, 8, 8)
        assert drawn["images"].dtype == np.uint8
        assert np.bincount(drawn["labels"]).tolist() == [3] * 5 + [2] * 5
    assert len(data.load(str(file), [str(d) for d in range(10)], 1, 8)) == 25


def test_the_seed_decides_the_images():
    pipeline, labels = load_base("default"), torch.arange(10)
    first, again, other = (
        generate.draw_images(pipeline, labels, sampler_steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_do_not_repeat_from_one_batch_to_the_next(monkeypatch):
    monkeypatch.setattr(generate, "_BATCH", 10)
    labels = generate.even_labels(20, 10)
    images = generate.draw_images(load_base("default"), labels, sampler_steps=2, seed=0)
    assert not np.array_equal(images[:10], images[10:])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--output a.npz", "either --run DIR or --base"),
        ("--output a.npz --run x --base default", "either --run DIR or --base"),
        ("--output a.npz --run missing", "not the folder of a run"),
        ("--output a.png --base default", "must end in .npz"),
        ("--output missing/a.npz --base default", "does not exist"),
        ("--output a.npz --base default --num 0", "num must be"),
        ("--output a.npz --base missing", "no class-conditional"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert generate.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
