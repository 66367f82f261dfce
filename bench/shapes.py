"""Shapes by name, shared by the kernels' tests and the benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A layer and a batch: N records of K draws of T tokens, I in and O out features, rank R."""

    n_records: int
    draws: int
    tokens: int
    in_features: int
    out_features: int
    rank: int


SMALL = {
    "odd": Shape(3, 2, 37, 45, 67, 5),
    "one_token": Shape(5, 3, 1, 33, 20, 4),
    "one_row": Shape(4, 1, 1, 16, 16, 2),
    "one_record": Shape(1, 4, 9, 40, 24, 8),
    "no_records": Shape(0, 2, 7, 16, 24, 4),
    "rank_1": Shape(2, 1, 20, 24, 40, 1),
    "rank_17": Shape(2, 2, 33, 40, 24, 17),
    "rank_128": Shape(2, 1, 24, 40, 72, 128),
    "many_rows": Shape(2, 1, 600, 24, 20, 4),
    "many_draws": Shape(2, 9, 64, 20, 24, 3),
}
"""For correctness: every edge of a tile, one and several programs for a record's rows."""


def _square(side: int, channels: int) -> Shape:
    return Shape(16, 1, side**2, channels, channels, 4)


def _text(features: int, channels: int) -> Shape:
    return Shape(16, 1, 77, features, channels, 4)


LAYERS = {
    "sd15_64x64": _square(64, 320),
    "sd15_32x32": _square(32, 640),
    "sd15_16x16": _square(16, 1280),
    "sd15_8x8": _square(8, 1280),
    "sd15_text_320": _text(768, 320),
    "sd15_text_640": _text(768, 640),
    "sd15_text_1280": _text(768, 1280),
    "sdxl_64x64": _square(64, 640),
    "sdxl_32x32": _square(32, 1280),
    "sdxl_text_640": _text(2048, 640),
    "sdxl_text_1280": _text(2048, 1280),
    "celeba_32x32": _square(32, 128),
    "celeba_16x16": _square(16, 256),
    "celeba_8x8": _square(8, 512),
}
"""LoRA layers at 16 records, K = 1 and rank 4: of SD 1.5 at 512 px, SDXL at 1024 px, and the latent
UNet of arXiv 2406.01355 for CelebA-64."""

N_VALUES = {"sd15_512": 797_184, "sdxl_1024": 5_806_080}
"""Trainable parameters at rank 4."""

MODELS = {
    "sd15_512": {
        "sd15_64x64": 30,
        "sd15_32x32": 30,
        "sd15_16x16": 30,
        "sd15_8x8": 6,
        "sd15_text_320": 10,
        "sd15_text_640": 10,
        "sd15_text_1280": 12,
    },
    "sdxl_1024": {
        "sdxl_64x64": 60,
        "sdxl_32x32": 360,
        "sdxl_text_640": 20,
        "sdxl_text_1280": 120,
    },
    "celeba_64": {"celeba_32x32": 20, "celeba_16x16": 20, "celeba_8x8": 24},
}
"""How many of each a model has: SD 1.5 128 in all, SDXL 560.

Four in self-attention, two more and two of text in cross-attention. For CelebA-64 the joint q, k, v
layer counts as three.
"""
