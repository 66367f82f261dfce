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


def _blocks(blocks: dict[tuple[int, int], int], text_features: int | None) -> dict[Shape, int]:
    """LoRA layers of transformer blocks {(tokens, channels): count}, at 16 records, K = 1, r = 4.

    Self-attention has four square layers, cross-attention two more and two on 77 text tokens.
    """
    layers: dict[Shape, int] = {}
    for (tokens, channels), count in blocks.items():
        layers[Shape(16, 1, tokens, channels, channels, 4)] = (6 if text_features else 4) * count
        if text_features:
            text = Shape(16, 1, 77, text_features, channels, 4)
            layers[text] = layers.get(text, 0) + 2 * count
    return layers


MODELS = {
    "sd15_512": _blocks({(4096, 320): 5, (1024, 640): 5, (256, 1280): 5, (64, 1280): 1}, 768),
    "sdxl_1024": _blocks({(4096, 640): 10, (1024, 1280): 60}, 2048),
    "celeba_64": _blocks({(1024, 128): 5, (256, 256): 5, (64, 512): 6}, None),
}
"""LoRA layers of a model and how many of each: SD 1.5 has 128, SDXL 560.

CelebA-64 is the latent UNet of arXiv 2406.01355; there q, k and v are one layer of three times the
channels, which counts as three here.
"""
