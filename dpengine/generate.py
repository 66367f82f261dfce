"""Draw images from a run's released adapter, or from the base model alone.

python -m dpengine.generate --run DIR --num 1000 --output FILE.npz
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import shlex
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from . import cli
from .errors import positive_int, printable
from .evaluation.images import draw_images, even_labels, load_alone, save_images
from .models import Objective, adapter, family_of
from .models.base import load_base
from .run import durable
from .run import folder as run_folder
from .run.folder import RunFolder
from .run.progress import phase
from .settings import MOST_IMAGES, UserPath


@dataclass(frozen=True)
class GenerateSettings:
    """Draw labelled images from a run, or from a base model alone, into an .npz file."""

    output: UserPath
    """New .npz to write: `images` uint8 [N, H, W] or [N, H, W, C], and `labels` int64 [N]."""
    run: UserPath | None = None
    """Folder of a finished run."""
    base: UserPath | None = None
    """Base model alone: `default`, a folder or a hub id."""
    prompt: tuple[str, ...] = ()
    """What the base alone shall draw, where it follows prompts."""
    num: int = 2000
    """Number of images, spread evenly over the classes."""
    sampler_steps: int = 10
    """Denoising steps for each image."""
    seed: int = 0
    """Seed of the images. Public: the weights are released."""


def load_run(folder: RunFolder) -> Objective:
    """The base model of a run with its released adapter."""
    settings = run_folder.read_settings(folder)
    if not folder.report.exists():
        raise ValueError(
            f"run {str(folder.path)!r} is unfinished; finish it with "
            f"python -m dpengine.finetune --resume {shlex.quote(str(folder.path))}"
        )
    pipeline = load_base(settings.model.base)
    try:
        adapter.load_lora(pipeline, folder.path)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{str(folder.adapter)!r} is no adapter of the run's base model "
            f"({next(iter(str(error).splitlines()), '')}); restore it, or the base"
        ) from error
    return family_of(pipeline).make(pipeline, settings.data.texts, settings.data.image_size)


def generate(settings: GenerateSettings) -> None:
    """Run the command."""
    positive_int(num=settings.num, sampler_steps=settings.sampler_steps)
    if settings.num > MOST_IMAGES:
        raise ValueError(
            f"num must be at most {MOST_IMAGES:,}, got {settings.num}; draw more with other seeds"
        )
    if not -(2**63) <= settings.seed < 2**63:
        raise ValueError(f"seed must lie between -2**63 and 2**63 - 1, got {settings.seed}")
    if settings.run is not None and settings.prompt:
        raise ValueError("a run draws what its own prompts say; leave prompt out")
    if (settings.run is None) == (settings.base is None):
        raise ValueError("give either --run DIR or --base NAME, one of the two")
    output = durable.check_new_file("output", settings.output, ".npz")
    phase("Loading the model")
    if settings.run is not None:
        objective = load_run(RunFolder(Path(settings.run)))
    else:
        objective = load_alone(settings.base, settings.prompt)
    labels = even_labels(settings.num, len(objective.texts))
    drawn = {"sampler_steps": settings.sampler_steps, "seed": settings.seed}
    phase(f"Drawing {settings.num:,} images")
    images = draw_images(objective, labels, **drawn)
    durable.check_new_file("output", settings.output, ".npz")  # it took a while
    save_images(output, images, labels, **drawn)
    print(f"{settings.num} images written to {printable(str(output))}")


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.generate", GenerateSettings, generate, args)


if __name__ == "__main__":
    raise SystemExit(main())
