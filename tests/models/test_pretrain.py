"""The shipped base model: small, loadable, and its samples carry their class."""

import torch

from dpengine.models import DEFAULT_BASE, ClassConditionalPipeline
from dpengine.models.glyphs import CLASS_NAMES, glyphs
from dpengine.models.pretrain import pretrain


def base() -> ClassConditionalPipeline:
    return ClassConditionalPipeline.from_pretrained(DEFAULT_BASE)


def test_shipped_base_is_small():
    assert sum(path.stat().st_size for path in DEFAULT_BASE.rglob("*")) < 5_000_000


def test_shipped_base_is_in_evaluation_mode_with_all_classes():
    pipeline = base()
    assert pipeline.class_embedding.config.class_names == CLASS_NAMES
    assert not pipeline.unet.training


def test_samples_of_the_shipped_base_carry_their_class():
    labels = torch.arange(100) % 10
    images = base()(labels, generator=torch.Generator().manual_seed(0)).flatten(1)
    public, public_labels = glyphs(2000, torch.Generator().manual_seed(1))
    nearest = torch.cdist(images, public.flatten(1)).argmin(1)
    # Guessing is right 10 times in 100 with a standard deviation of 3.
    assert (public_labels[nearest] == labels).sum() >= 80


def test_the_same_seed_trains_the_same_model():
    first, second = (pretrain(num_steps=2, batch_size=4, num_glyphs=20) for _ in range(2))
    for a, b in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(a, b)
