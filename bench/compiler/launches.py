"""The launches of each op at a named shape, without data: tensors lie on `meta`."""

import torch
from torch import Tensor

from dpengine.kernels.gpu import (
    clip_and_sum,
    column_sums,
    embedding,
    gram,
    lora_conv,
    lora_forward,
    lora_side_b,
    noise,
    product,
    product_sq_norms,
    sq_norms,
    tiling,
    weighted_product,
)
from dpengine.kernels.gpu.launch import Launch

from ..shapes import Shape


def launches(shape: Shape, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """All launches of a layer's ops, by the name of the op."""

    def rows(features: int) -> Tensor:
        return _meta(shape.n_records * shape.draws, shape.tokens, features, dtype=dtype)

    n, rank, n_rows = shape.n_records, shape.rank, shape.draws * shape.tokens
    x, g, h = rows(shape.in_features), rows(shape.out_features), rows(rank)
    lora_a, lora_b = _meta(rank, shape.in_features), _meta(shape.out_features, rank)
    weight = shape.out_features, shape.in_features
    keep = _meta(n, dtype=torch.bool)
    groups = tiling.ceil_div(n, tiling.RECORDS)

    def norms(columns: int) -> Tensor:
        return _meta(n, columns, dtype=torch.float64)

    found = {
        "lora_forward": lora_forward.launches(g, x, lora_a, lora_b, 1.0, h),
        "lora_side_b": lora_side_b.launches(g, h, lora_b, 1.0, h, _meta(n, *lora_b.shape)),
        "lora_side_a": product.launches(h, x, _meta(n, *lora_a.shape), lora_a, x),
        "per_record_product": product.launches(g, x, _meta(n, *weight)),
        "product_sq_norms": product_sq_norms.launches(
            g, x, norms(product_sq_norms.sq_norm_columns(*weight))
        ),
        "weighted_product": weighted_product.launches(
            g, x, _meta(n, dtype=torch.float64), keep, _meta(groups, *weight, dtype=torch.float64)
        ),
        "embedding": embedding.launches(
            _meta(*g.shape[:2], dtype=torch.int64), g, None, _meta(n, 10, shape.out_features)
        ),
        "bias": column_sums.launches(g, None, _meta(n, shape.out_features)),
        "scale": column_sums.launches(g, g, _meta(n, shape.out_features)),
    }
    if shape.tokens <= 256:
        blocks = gram.n_blocks(n_rows)
        pairs = _meta(n, blocks, blocks, dtype=torch.float64)
        found["gram"] = gram.launches(g, x, pairs, norms(blocks))
    side = int(shape.tokens**0.5)
    if side**2 == shape.tokens:
        found["lora_conv_side_a"] = _conv(shape, side, dtype)
    return found


def _conv(shape: Shape, side: int, dtype: torch.dtype) -> list[Launch]:
    rows, n = shape.n_records * shape.draws, shape.n_records
    images = _meta(rows, side, side, shape.in_features, dtype=dtype).permute(0, 3, 1, 2)
    u = _meta(rows, side, side, shape.rank, dtype=dtype).permute(0, 3, 1, 2)
    grad = _meta(n, shape.rank, shape.in_features, 3, 3)
    return lora_conv.launches(images, u, (1, 1), (1, 1), (1, 1), grad)


def slab_launches(
    n_records: int, n_values: int, dtype: torch.dtype = torch.float32
) -> dict[str, list[Launch]]:
    """The launches that work on a whole slab [N, P] or on its sum [P]."""
    slab = _meta(n_records, n_values, dtype=dtype)
    keep, total = _meta(n_records, dtype=torch.bool), _meta(n_values, dtype=torch.float64)
    norms = _meta(n_records, dtype=torch.float64)
    partial = _meta(n_records, sq_norms.sq_norm_columns(n_values), dtype=torch.float64)
    stream = _meta(12, dtype=torch.int32)
    return {
        "sq_norms": sq_norms.launches(slab, partial),
        "clip_and_sum": clip_and_sum.launches(slab, norms, keep, 1.0, 1.0, total),
        "add_noise": noise.launches(total, stream, 1.0, 1.0, total),
        "chacha20_words": noise.words_launches(
            stream, _meta(tiling.ceil_div(n_values, 8), 8, dtype=torch.int64)
        ),
    }


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
