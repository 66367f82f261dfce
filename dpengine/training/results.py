"""What a run draws and writes from its weights, tried once before anything is spent."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..evaluation import grid as preview
from ..evaluation.images import draw_images, even_labels, save_images
from ..models import ClassConditionalPipeline, adapter
from ..models.base import load_base
from ..settings import Settings

_FEW = 2


def write_adapter(pipeline: ClassConditionalPipeline, folder: Path, base: str) -> None:
    """Write the adapter to ``folder``, and load it back into a fresh ``base``.

    Raises ValueError where what is written is not what was trained.
    """
    adapter.save_lora(pipeline.unet, folder)
    adapter.check_loads_back(pipeline.unet, folder, load_base(base))


def write_images(
    pipeline: ClassConditionalPipeline,
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
    names = pipeline.class_embedding.config.class_names
    labels = even_labels(num_synthetic or settings.output.num_synthetic, len(names))
    images = draw_images(pipeline, labels, **drawn)
    save_images(synthetic, images, labels, **drawn)

    columns, shown = preview.fit(pipeline.image_size, len(names))
    if num_synthetic is not None:
        columns, shown = 1, shown[:num_synthetic]
    labels = torch.tensor(shown).repeat(columns)
    private = draw_images(pipeline, labels, **drawn)
    pipeline.unet.disable_adapters()
    try:
        public = draw_images(pipeline, labels, **drawn)
    finally:
        pipeline.unet.enable_adapters()
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


def rehearse(pipeline: ClassConditionalPipeline, settings: Settings) -> None:
    """Encode, write, load back, sample, decode and draw, in a folder that is then removed.

    What fails here would fail after the last step, with the budget spent.
    """
    unet, size = pipeline.unet, pipeline.image_size
    pipeline.encode(torch.zeros(1, pipeline.image_channels, size, size, device=unet.device))
    was_training, trained = unet.training, [p for p in unet.parameters() if p.requires_grad]
    with TemporaryDirectory() as folder:
        write_adapter(pipeline, Path(folder), settings.model.base)
        files = Path(folder, "synthetic.npz"), Path(folder, "samples.png")
        write_images(pipeline, settings, *files, num_synthetic=_FEW)
    unet.train(was_training)
    unet.requires_grad_(False)  # PEFT makes all of an adapter trainable as it enables it
    for param in trained:
        param.requires_grad_(True)


def _is_blank(images: np.ndarray) -> bool:
    """Whether every image is of one colour."""
    flat = images.reshape(len(images), -1, images.shape[-1] if images.ndim == 4 else 1)
    return bool((flat == flat[:, :1]).all())
