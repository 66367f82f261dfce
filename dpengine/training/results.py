"""What a run draws and writes from its weights, tried once before anything is spent."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..evaluation import grid as preview
from ..evaluation.images import draw_images, even_labels, save_images
from ..models import Objective, adapter, family_of, make_path
from ..models.base import load_base
from ..settings import Settings

_FEW = 2


def write_adapter(objective: Objective, folder: Path, settings: Settings) -> None:
    """Write the adapter to ``folder``, and load it back into a fresh base.

    Raises ValueError where what is written is not what was trained.
    """
    adapter.save_lora(objective.denoiser, folder, adapter.part_of(objective.pipeline))
    pipeline = load_base(settings.model.base)
    fresh = family_of(pipeline).make(pipeline, settings.data.texts, settings.data.image_size)
    path = make_path(pipeline.scheduler).to(objective.denoiser.device)
    adapter.check_loads_back(objective, path, folder, fresh)


def write_images(
    objective: Objective,
    settings: Settings,
    synthetic: Path,
    samples: Path,
    num_synthetic: int | None = None,
) -> None:
    """Write the synthetic images and the picture of base and adapter, from public seeds.

    num_synthetic: instead of the settings' number, of the picture's images as well.

    Raises ValueError where the adapter draws images without content: its weights are then useless,
    however finite.
    """
    drawn = {"sampler_steps": settings.output.sampler_steps, "seed": settings.training.seed}
    names = list(objective.texts)
    labels = even_labels(num_synthetic or settings.output.num_synthetic, len(names))
    images = draw_images(objective, labels, **drawn)
    save_images(synthetic, images, labels, **drawn)

    columns, shown = preview.fit(objective.image_size, len(names))
    if num_synthetic is not None:
        columns, shown = 1, shown[:num_synthetic]
    labels = torch.tensor(shown).repeat(columns)
    private = draw_images(objective, labels, **drawn)
    with adapter.disabled(objective.denoiser):
        public = draw_images(objective, labels, **drawn)
    with_noise = settings.privacy.epsilon < float("inf")
    of_classes = f", {len(shown)} of {len(names)} classes" if len(shown) < len(names) else ""
    panels = {
        f"base model{of_classes}": public,
        "private adapter" if with_noise else "adapter trained without privacy": private,
    }
    preview.save_grid(samples, [names[i] for i in shown], panels)
    if _is_blank(private) and not _is_blank(public):
        raise ValueError(
            "the trained adapter draws images without content, as weights do that grew too far; "
            "its budget is spent. Start a new run with a smaller learning_rate: "
            f"{samples.parent} keeps what there is, and no report"
        )


def rehearse(objective: Objective, settings: Settings) -> None:
    """Encode, write, load back, sample, decode and draw, in a folder that is then removed.

    What fails here would fail after the last step, with the budget spent.
    """
    denoiser, size = objective.denoiser, objective.image_size
    was_training = denoiser.training
    objective.encode(torch.zeros(1, objective.image_channels, size, size, device=denoiser.device))
    with TemporaryDirectory() as folder:
        write_adapter(objective, Path(folder), settings)
        files = Path(folder, "synthetic.npz"), Path(folder, "samples.png")
        write_images(objective, settings, *files, num_synthetic=_FEW)
    denoiser.train(was_training)


def _is_blank(images: np.ndarray) -> bool:
    """Whether every image is of one colour."""
    flat = images.reshape(len(images), -1, images.shape[-1] if images.ndim == 4 else 1)
    return bool((flat == flat[:, :1]).all())
