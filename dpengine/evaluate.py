"""How useful synthetic digits are: train a classifier on them, test it on real ones.

python -m dpengine.evaluate --run DIR

The real digits are the 360 that no run trains on. They are public here; on private data of your
own, such a number is itself a release that the run's epsilon does not cover.
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from . import cli
from .evaluation.images import draw_images, even_labels, load_alone
from .evaluation.scores import synthetic_accuracy
from .run import folder as run_folder
from .run.folder import RunFolder
from .run.progress import phase
from .settings import DIGITS, UserPath


@dataclass(frozen=True)
class EvaluateSettings:
    """Test a classifier trained on a run's synthetic digits on real, held-out digits."""

    run: UserPath
    """Folder of a finished run on `digits`."""


def base_accuracy(base: str, num: int, sampler_steps: int, seed: int) -> float:
    """The same accuracy for images of the base model alone."""
    objective = load_alone(base)
    labels = even_labels(num, len(objective.texts))
    images = draw_images(objective, labels, sampler_steps=sampler_steps, seed=seed)
    return synthetic_accuracy(images, labels.numpy())


def evaluate(settings: EvaluateSettings) -> None:
    """Run the command."""
    folder = RunFolder(Path(settings.run))
    run = run_folder.read_settings(folder)
    if run.data.data != DIGITS:
        raise ValueError(
            f"run {settings.run!r} was not trained on digits; there is nothing to test"
        )
    if not folder.synthetic.exists():
        raise ValueError(f"run {settings.run!r} has no synthetic.npz: finish it with --resume")
    images, labels, sampler_steps, seed = _read_synthetic(folder)
    adapted = synthetic_accuracy(images, labels)
    phase("Drawing as many images of the base model")
    base = base_accuracy(run.model.base, len(labels), int(sampler_steps), int(seed))
    print("Accuracy on 360 held-out real digits of a classifier trained on images of")
    print(f"  the base model   {base:.3f}")
    print(f"  the adapter      {adapted:.3f}   ({100 * (adapted - base):+.1f} points)")


def _read_synthetic(folder: RunFolder) -> list[np.ndarray]:
    """Images, labels, and what they were drawn by. Raises ValueError where they are damaged."""
    try:
        with np.load(folder.synthetic) as synthetic:
            return [synthetic[name] for name in ("images", "labels", "sampler_steps", "seed")]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{str(folder.synthetic)!r} cannot be read as the images of a run; restore it"
        ) from error


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.evaluate", EvaluateSettings, evaluate, args)


if __name__ == "__main__":
    raise SystemExit(main())
