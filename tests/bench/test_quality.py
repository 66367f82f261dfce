"""Quality: images are reduced as finetune does it, finished runs are read and never mixed up."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import mnist, quality
from bench.scores import Labelled
from dpengine.data import records as data
from dpengine.run.folder import RunFolder


def some(count, size=8):
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Labelled(images, torch.arange(count) % 10)


OPTIONS = ["--num-steps", "2", "--num-synthetic", "15"]
TASK = quality.Task("digits", some(20), some(10), some(30), OPTIONS, "feed" * 16)
NAME = "digits-feedfeed-epsilon-3-seed-1"


def made(folder, settings, images=20):
    """The files of a finished run that the measure reads."""
    run = RunFolder(folder / NAME)
    run.path.mkdir(exist_ok=True)
    run.config.write_text(json.dumps(settings.to_dict()))
    run.report.write_text(json.dumps({"epsilon": {"upper": 2.9}, "noise_multiplier": 7.0}))
    pixels = np.arange(images * 64, dtype=np.uint8).reshape(images, 8, 8)
    np.savez(run.synthetic, images=pixels, labels=np.arange(images) % 10)
    return run


def test_images_are_reduced_as_finetune_reduces_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    np.savez(tmp_path / "m.npz", x_train=pixels, y_train=[1, 2, 3], x_test=pixels, y_test=[4, 5, 6])
    loaded = data.load(str(tmp_path / "m.npz"), quality.CLASS_NAMES, 1, mnist.IMAGE_SIZE)
    train, test = (quality._mnist_images(tmp_path / "m.npz", part) for part in ("train", "test"))
    assert torch.equal(train.images, loaded.images) and train.labels.tolist() == [1, 2, 3]
    assert torch.equal(test.images, train.images) and test.labels.tolist() == [4, 5, 6]


def test_rendered_images_are_like_the_private_ones():
    images, labels = mnist.rendered(40, torch.Generator().manual_seed(0))
    assert images.shape == (40, 1, 14, 14) and labels.bincount().tolist() == [4] * 10
    assert images.amin() == -1 and 0.5 < images.amax() <= 1
    # MNIST's margin of four pixels is two here, but for digits whose mass lies off their centre.
    assert images[:, :, 0].amax() == -1


def test_the_settings_are_those_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(quality.mnist, "rendered", lambda *_: (some(1).images, some(1).labels))
    monkeypatch.setattr(quality, "_mnist_images", lambda *_: some(1))
    monkeypatch.setattr(quality, "base_digest", lambda base: f"of {base}")
    task = quality.mnist_task(tmp_path / "m.npz", tmp_path)
    settings = task.settings(math.inf, 2, tmp_path / "run")
    assert settings.privacy.epsilon == math.inf and settings.training.seed == 2
    assert settings.privacy.public_dataset_size == 60_000 and settings.privacy.delta == 1e-6
    assert task.base_sha256 == f"of {tmp_path}"
    assert settings.data.data == str(tmp_path / "m.npz") and settings.model.base == str(tmp_path)


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("it ran again"))
    run = made(tmp_path, TASK.settings(3.0, 1, tmp_path / NAME))
    found = quality.measure_run(
        quality.finished(TASK, 3.0, 1, tmp_path), lambda images: {"n": len(images)}
    )
    assert found == {
        **{"epsilon": 3.0, "seed": 1, "certified_epsilon": 2.9, "noise_multiplier": 7.0, "n": 20}
    }
    assert run.path.exists()


def test_a_run_may_be_moved(tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    made(folder, TASK.settings(3.0, 1, tmp_path / "before"))
    assert quality.finished(TASK, 3.0, 1, folder).path.parent == folder


def test_a_run_with_other_settings_is_not_taken(tmp_path):
    settings = TASK.settings(3.0, 1, tmp_path / NAME)
    made(tmp_path, replace(settings, privacy=replace(settings.privacy, num_steps=3)))
    with pytest.raises(SystemExit, match="other settings"):
        quality.finished(TASK, 3.0, 1, tmp_path)


def test_a_run_that_is_missing_is_made_by_the_command(tmp_path, monkeypatch):
    commands = []

    def make(command, check):
        commands.append(command)
        made(tmp_path, TASK.settings(3.0, 1, tmp_path / NAME))

    monkeypatch.setattr(quality.subprocess, "run", make)
    run = quality.finished(TASK, 3.0, 1, tmp_path)
    (command,) = commands
    assert command[1:7] == ["-m", "dpengine.finetune", *OPTIONS]
    assert command[7:] == ["--epsilon", "3", "--seed", "1", "--output", str(run.path)]


def test_a_run_that_was_interrupted_is_resumed(tmp_path, monkeypatch):
    commands = []
    run = RunFolder(tmp_path / NAME)
    run.path.mkdir()
    run.ledger.write_text("")

    def make(command, check):
        commands.append(command[1:])
        made(tmp_path, TASK.settings(3.0, 1, run.path))

    monkeypatch.setattr(quality.subprocess, "run", make)
    assert quality.finished(TASK, 3.0, 1, tmp_path).path == run.path
    assert commands == [["-m", "dpengine.finetune", "--resume", str(run.path)]]


def test_runs_of_another_base_model_are_not_taken(tmp_path, monkeypatch):
    made(tmp_path, TASK.settings(3.0, 1, tmp_path / NAME))
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("it is made"))
    other = replace(TASK, base_sha256="beef" * 16)
    with pytest.raises(pytest.fail.Exception, match="it is made"):
        quality.finished(other, 3.0, 1, tmp_path)


def test_two_base_models_differ_in_their_digest(tmp_path):
    pipeline = quality.load_base("default")
    with torch.no_grad():
        next(pipeline.unet.parameters())[0] += 1
    pipeline.save_pretrained(tmp_path)
    default = quality.base_digest("default")
    assert len(default) == 64 and quality.base_digest(str(tmp_path)) != default


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mnist"], "mnist needs --data and --base"),
        (["mnist", "--data", "no.npz", "--base", "."], "there is no no.npz"),
        (["digits", "--inception", "no.pt"], "there is no no.pt"),
    ],
)
def test_what_is_missing_is_told_in_a_sentence(options, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", *options])
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_bytes_become_the_range_of_the_model():
    images = quality.labelled(np.array([[[0, 255]]], np.uint8), np.array([7]))
    assert images.images.flatten().tolist() == [-1, 1] and images.labels.tolist() == [7]


def test_every_run_is_measured_and_stands_beside_the_base_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "accuracies", lambda _, images: {"seen": len(images)})
    monkeypatch.setattr(quality.scores, "glyph_features", lambda _: lambda x: x.flatten(1).double())
    monkeypatch.setattr(quality, "base_images", lambda settings: some(10 + settings.training.seed))
    monkeypatch.setattr(quality, "finished", lambda *of: of[1:3])
    monkeypatch.setattr(quality, "measure_run", lambda run, _: {"epsilon": run[0], "seed": run[1]})
    content = quality.measure(TASK, (1.0, 8.0), (0, 1), tmp_path, None)
    runs = [(e, s) for s in (0, 1) for e in (1.0, 8.0)]
    assert [(r["epsilon"], r["seed"]) for r in content["runs"]] == runs
    assert [base["seen"] for base in content["base"]] == [10, 11]
    # The distance beside real images is that of the held-out ones.
    test, train = (part.images.flatten(1).double() for part in (TASK.test, TASK.train))
    expected = quality.scores.frechet_distance(test, train)
    assert content["real"] == {"seen": 20, "frechet_glyphs": pytest.approx(expected)}
    assert content["real_as_many"] == {"seen": 15}
    assert content["base_weights_sha256"] == TASK.base_sha256 and content["image_size"] == 8


def test_distances_are_of_as_many_images_as_there_are_to_test_on():
    def features(images):
        assert len(images) == len(TASK.test)
        return images.flatten(1).double()

    reference = {"glyphs": TASK.train.images.flatten(1).double()}
    quality.distances(TASK, some(30), {"glyphs": features}, reference)


def test_a_sample_is_of_all_places_and_the_same_each_time():
    found = quality.sample(some(1000), 100)
    assert len(found) == 100 and len(set(found.labels.tolist())) == 10
    assert torch.equal(found.images, quality.sample(some(1000), 100).images)
    assert not torch.equal(found.images, some(1000).images[:100])


def test_runs_are_not_lost_to_fewer(tmp_path):
    runs = [{"epsilon": "inf", "seed": 0}, {"epsilon": 8.0, "seed": 1}]
    quality.results.write("quality-digits", {"runs": runs}, tmp_path)
    asked = {(math.inf, 0), (8.0, 1), (1.0, 0)}
    quality.check_nothing_is_lost("quality-digits", asked, tmp_path)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"date": "2020-01-01"}))  # of whatever day
    with pytest.raises(SystemExit, match=r"2020-01-01.*\(8.0, 1\)"):
        quality.check_nothing_is_lost("quality-digits", {(math.inf, 0)}, tmp_path)
