"""What training needs of a base model, whatever its family: one small protocol, and its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .noising import NoisePath, TimeLaw

Batch = dict[str, Tensor]
"""Tensors by name, rows along the first axis of each. `latents` [B, ...] come first,
`diffusion_noise` has their shape, `times` int64 [B] are positions in the tables of a path; the
others say what is shown."""


class Objective(Protocol):
    """A base model as training sees it. Nothing here is random, and no row sees another."""

    pipeline: Any
    """The diffusers pipeline that holds it."""
    texts: tuple[str, ...]
    """What its images can be of, public: the names of its classes, or prompts. Labels are positions
    in it."""
    image_size: int
    """Height and width of the images, in pixels."""

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained."""

    @property
    def image_channels(self) -> int:
        """Channels of the images: 1 for grey, 3 for colour."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of what is kept of one image."""

    def encode(self, image: Tensor) -> Tensor:
        """What is kept of an image: float32 [1, C, H, W] in [-1, 1] to [1, *latent_shape]."""

    def condition(self, texts: Sequence[str]) -> Batch:
        """What the denoiser is given for each text; each tensor has one line a text.

        For classes, ``texts`` must be among the model's own.
        """

    def predict(self, noisy: Tensor, steps: Tensor, conditions: Batch) -> Tensor:
        """The denoiser's answer for each row: [B, *latent_shape] at steps [B] to the same shape."""

    def draw(
        self, texts: Sequence[str], num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        """An image of each text, float32 [B, C, H, W] in [-1, 1], the generator its only chance."""


@dataclass(frozen=True)
class Family:
    """A kind of base model, known by the class that its `model_index.json` names.

    ``components`` lists, for each part of a folder, the classes that may be made of it, as
    `library.Class`; parts in ``optional`` may be absent, those in ``ignored`` are not loaded.
    ``options`` are entries of its index that are no parts, with what stands for them here, or None.
    """

    pipeline: str
    """Name of its class: of diffusers, or ours."""
    make: Callable[..., Objective]
    """``make(pipeline, texts=(), image_size=None)``; raises ValueError where it does not fit."""
    components: dict[str, tuple[str, ...]]
    target_modules: tuple[str, ...]
    time_law: TimeLaw = "uniform"
    follows_prompts: bool = True
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def row_losses(objective: Objective, path: NoisePath, batch: Batch) -> Tensor:
    """Weighted mean squared error of each row's answer.  [B]

    A row's value depends on that row alone, and nothing here is random.
    """
    times = batch["times"]
    noisy, target = path(batch["latents"], batch["diffusion_noise"], times)
    answer = objective.predict(noisy, path.steps[times], batch)
    losses = (answer - target).square().flatten(1).mean(1)
    return losses if path.weights is None else losses * path.weights[times].to(losses.dtype)


def synthetic_rows(objective: Objective, path: NoisePath, n_rows: int) -> Batch:
    """Rows of fixed synthetic records, no two alike: noise for images, any text, any time.

    On the device of the model, and the same each time. For checks and dry runs.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (n_rows, *objective.latent_shape)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    which = torch.randint(len(objective.texts), (n_rows,), generator=generator)
    times = torch.randint(len(path), (n_rows,), generator=generator)
    rows = {"latents": latents, "diffusion_noise": noise, "times": times}
    for name, table in objective.condition(objective.texts).items():
        lines = table.cpu()[which]
        if table.is_floating_point():
            # Other records have other embeddings, of the same size and not those of one prompt.
            spread = 1 + 0.1 * torch.randn(lines.shape, generator=generator)
            lines = lines * spread.to(lines.dtype)
        rows[name] = lines
    return {name: tensor.to(objective.denoiser.device) for name, tensor in rows.items()}
