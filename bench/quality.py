"""What privacy costs in quality: synthetic images against epsilon, from whole runs.

python -m bench.quality digits
python -m bench.quality mnist --data mnist.npz --base FOLDER    # FOLDER by python -m bench.mnist

Each run is `python -m dpengine.finetune`, the same but for epsilon and seed. Its synthetic images
alone train two classifiers, tested on real images that no run has seen; a Fréchet distance to the
real training images is taken in the features of a classifier of rendered glyphs, and in those of
Inception where its file is given. Beside the runs stand the base model, and real images in place of
synthetic ones: as many as there are synthetic ones, and all. Epsilon infinity is the same recipe
without noise, not one that was tuned for it.

These numbers look at real images: they are for public data. Runs that stand finished in --runs with
the same base model and settings are read, not repeated, and one that was interrupted is resumed.
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from dpengine.data import records as data
from dpengine.evaluation.images import draw_images, even_labels, load_alone
from dpengine.models.base import load_base
from dpengine.models.glyphs import glyphs
from dpengine.run import folder as run_folder
from dpengine.run.folder import RunFolder
from dpengine.settings import DIGITS, Settings
from dpengine.training.job import complete

from . import mnist, results, scores
from .scores import Features, Labelled

EPSILONS = (1.0, 3.0, 8.0, 10.0, math.inf)
SEEDS = (0, 1, 2)
NUM_GLYPHS = 20_000
CLASS_NAMES = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Task:
    """Private images, what they are compared with, and the recipe.

    train: the real images that runs are trained on; test: real images that no run sees.
    options: of `dpengine.finetune`, all but epsilon, seed and output. base_sha256: of the base
    model's UNet.
    """

    name: str
    train: Labelled
    test: Labelled
    glyphs: Labelled
    options: Sequence[str]
    base_sha256: str

    @property
    def num_compared(self) -> int:
        """Images that a distance is taken of."""
        settings = self.settings(1.0, 0, Path("unused"))
        return min(len(self.test), settings.output.num_synthetic)

    def arguments(self, epsilon: float, seed: int) -> list[str]:
        return [*self.options, "--epsilon", f"{epsilon:g}", "--seed", str(seed)]

    def settings(self, epsilon: float, seed: int, output: Path) -> Settings:
        """What `dpengine.finetune` makes of the arguments, and keeps."""
        arguments = [*self.arguments(epsilon, seed), "--output", str(output)]
        kind = tyro.conf.OmitArgPrefixes[Settings]
        return tyro.cli(kind, args=arguments).with_absolute_paths()


def digits_task() -> Task:
    """scikit-learn's digits, everything at its default."""
    train, test = data.load(DIGITS, CLASS_NAMES, 1, 8), data.held_out_digits()
    return Task(
        "digits",
        Labelled(train.images, train.labels),
        Labelled(test.images, test.labels),
        Labelled(*glyphs(NUM_GLYPHS, torch.Generator().manual_seed(1))),
        [],
        base_digest(Settings().model.base),
    )


def mnist_task(file: Path, base: Path) -> Task:
    """MNIST: 60,000 private images, the test set held out."""
    public = Labelled(*mnist.rendered(NUM_GLYPHS, torch.Generator().manual_seed(1)))
    options = ["--data", str(file), "--base", str(base), *mnist.RECIPE]
    train, test = (_mnist_images(file, part) for part in ("train", "test"))
    return Task("mnist", train, test, public, options, base_digest(str(base)))


def _mnist_images(file: Path, part: str) -> Labelled:
    with np.load(file) as content:
        pixels, labels = content[f"x_{part}"], content[f"y_{part}"]
    images = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    return Labelled(mnist.reduced(images), torch.from_numpy(labels.astype(np.int64)))


def distances(
    task: Task, images: Labelled, features: dict[str, Features], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Fréchet distances of ``images`` to the real training images.

    Of equally many, since distances of few are larger: as there are synthetic images, or test
    images if those are fewer. reference: features of ``task.train``, by the names in ``features``.
    """
    some = sample(images, task.num_compared).images
    return {
        f"frechet_{name}": scores.frechet_distance(run(some), reference[name])
        for name, run in features.items()
    }


def sample(images: Labelled, count: int) -> Labelled:
    """Some of ``images``, the same each time: files are sorted in ways of their own."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return Labelled(images.images[rows], images.labels[rows])


def accuracies(task: Task, images: Labelled) -> dict[str, float]:
    """Of classifiers trained on ``images``, on the real images that no run sees."""
    return {
        "svc": scores.svc_accuracy(images, task.test),
        "cnn": scores.cnn_accuracy(images, task.test),
    }


def finished(task: Task, epsilon: float, seed: int, folder: Path) -> RunFolder:
    """The run in ``folder`` with this base model and settings, made or resumed where it must be."""
    base = task.base_sha256[:8]
    run = RunFolder(folder / f"{task.name}-{base}-epsilon-{epsilon:g}-seed-{seed}")
    if not run.report.exists():
        arguments = [*task.arguments(epsilon, seed), "--output", str(run.path)]
        if run.ledger.exists():
            arguments = ["--resume", str(run.path)]
        subprocess.run([sys.executable, "-m", "dpengine.finetune", *arguments], check=True)
    made, asked = run_folder.read_settings(run), task.settings(epsilon, seed, run.path)
    # Runs may be moved to another place.
    made = replace(made, output=replace(made.output, output=asked.output.output))
    if complete(made) != complete(asked):
        raise SystemExit(f"{run.path} is a run with other settings: give another --runs")
    return run


def measure_run(run: RunFolder, judge_images: Callable[[Labelled], dict]) -> dict[str, Any]:
    """What a finished run claims, and how good its synthetic images are."""
    settings, report = run_folder.read_settings(run), json.loads(run.report.read_text())
    with np.load(run.synthetic) as synthetic:
        images = labelled(synthetic["images"], synthetic["labels"])
    return {
        "epsilon": settings.to_dict()["privacy"]["epsilon"],
        "seed": settings.training.seed,
        "certified_epsilon": report["epsilon"]["upper"],
        "noise_multiplier": report["noise_multiplier"],
        **judge_images(images),
    }


def labelled(pixels: np.ndarray, labels: np.ndarray) -> Labelled:
    """Synthetic images uint8 [N, H, W] as classifiers take them."""
    images = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    return Labelled(images, torch.from_numpy(labels))


def base_images(settings: Settings) -> Labelled:
    """As many images of the base model alone, with the run's seed."""
    objective, output = load_alone(settings.model.base), settings.output
    labels = even_labels(output.num_synthetic, len(CLASS_NAMES))
    steps, seed = output.sampler_steps, settings.training.seed
    pixels = draw_images(objective, labels, sampler_steps=steps, seed=seed)
    return labelled(pixels, labels.numpy())


def measure(
    task: Task,
    epsilons: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    inception: Path | None,
) -> dict[str, Any]:
    """All runs and what stands beside them."""
    features = {"glyphs": scores.glyph_features(task.glyphs)}
    if inception is not None:
        features["inception"] = scores.inception_features(inception)
    reference = {name: run(task.train.images) for name, run in features.items()}

    def judged(images: Labelled) -> dict[str, float]:
        return accuracies(task, images) | distances(task, images, features, reference)

    settings = task.settings(epsilons[0], seeds[0], folder)
    num_synthetic = settings.output.num_synthetic
    content: dict[str, Any] = {
        "settings": settings.to_dict(),
        "image_size": task.train.images.shape[-1],
        "num_train": len(task.train),
        "num_test": len(task.test),
        "num_compared": task.num_compared,
        "base_weights_sha256": task.base_sha256,
        "real": accuracies(task, task.train) | distances(task, task.test, features, reference),
        "real_as_many": accuracies(task, sample(task.train, num_synthetic)),
        "base": [],
        "runs": [],
    }
    for seed in seeds:
        content["base"].append(judged(base_images(task.settings(epsilons[0], seed, folder))))
        for epsilon in epsilons:
            run = finished(task, epsilon, seed, folder)
            content["runs"].append(measure_run(run, judged))
    return content


def base_digest(base: str) -> str:
    """Which base model it is, in the end: SHA-256 of its UNet."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_base(base).unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_nothing_is_lost(suite: str, asked: set[tuple[float, int]], folder: Path) -> None:
    """Raise SystemExit where this device's newest file holds runs that a new one would not."""
    kept = results.newest(suite, folder).get(results.device_name(), {"runs": []})
    lost = {(float(run["epsilon"]), run["seed"]) for run in kept["runs"]} - asked
    if lost:
        raise SystemExit(
            f"the {suite} of {kept['date']} holds runs that the new file would hide, "
            f"{sorted(lost)}: ask for their --epsilons and --seeds too, or remove it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("digits", "mnist"))
    parser.add_argument("--data", type=Path, help="MNIST as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--base", type=Path, help="folder that python -m bench.mnist wrote")
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of runs")
    parser.add_argument("--inception", type=Path, help="Inception-v3 as TorchScript, for FID")
    parser.add_argument("--picture", type=Path, help="copy the picture of epsilon 8, seed 0 here")
    arguments = parser.parse_args()
    for path in (arguments.data, arguments.base, arguments.inception):
        if path is not None and not path.exists():
            parser.error(f"there is no {path}")
    if arguments.task == "digits":
        task = digits_task()
    elif arguments.data is None or arguments.base is None:
        parser.error("mnist needs --data and --base")
    else:
        task = mnist_task(arguments.data.absolute(), arguments.base.absolute())

    suite = f"quality-{task.name}"
    asked = {(epsilon, seed) for epsilon in arguments.epsilons for seed in arguments.seeds}
    check_nothing_is_lost(suite, asked, results.FOLDER)
    content = measure(
        task, arguments.epsilons, arguments.seeds, arguments.runs, arguments.inception
    )
    print(f"written to {results.write(suite, content)}")
    if arguments.picture is not None:
        shutil.copy(finished(task, 8.0, 0, arguments.runs).samples, arguments.picture)


if __name__ == "__main__":
    main()
