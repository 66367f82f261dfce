"""What fine-tuning on MNIST starts from: a base model that has seen rendered glyphs only.

python -m bench.mnist --output FOLDER

Nothing of MNIST is used but how its images were made, which is published: digits scaled into a box
of 20 pixels and centred by their mass in 28 (LeCun et al. 1998). The model works at half of that,
14 x 14 pixels, which is what two CPU cores can train; `dpengine.finetune` reduces the private
images by the same rule.
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpengine.models import ClassConditionalPipeline
from dpengine.models.glyphs import centred, written_digits
from dpengine.models.pretrain import pretrain

IMAGE_SIZE = 14
RECIPE = (
    *("--public-dataset-size", "60000", "--delta", "1e-6"),
    *("--sampling-rate", "0.025", "--num-steps", "48", "--draws-per-record", "1"),
    *("--rank", "8", "--alpha", "8", "--num-synthetic", "10000", "--physical-batch-size", "100"),
)
"""Options of `dpengine.finetune`: 1,500 expected images a step, 1.2 passes over the data. Synthetic
images cost no privacy: classifiers learn more from ten thousand than from two."""


def rendered(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Public images float32 [count, 1, 14, 14] in [-1, 1] and labels int64 [count]."""
    ink, labels = written_digits(count, generator)
    return reduced(2 * centred(ink) - 1), labels


def reduced(images: Tensor) -> Tensor:
    """Images [N, 1, 28, 28] as the model sees them, by the rule of `dpengine.data.records`.

    -> in [-1, 1]
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(-1, 1)


def make_base(num_steps: int = 1500) -> ClassConditionalPipeline:
    """The public base model; some minutes on a CPU, the same each time."""
    return pretrain(num_steps=num_steps, render=rendered)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    output = parser.parse_args().output
    make_base().save_pretrained(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
