"""The cost model: the figures of the literature, and the choices that follow from them."""

import pytest
import torch

from bench.shapes import LAYERS, MODELS
from dpengine.kernels import cost, ops


def lora_flops(way, rank=4):
    """FLOPs per record for all LoRA factors of Stable Diffusion 1.5 at 512 px."""
    total = 0
    for layer, count in MODELS["sd15_512"].items():
        shape = LAYERS[layer]
        for left, right in ((rank, shape.in_features), (shape.out_features, rank)):
            total += count * cost.ways(shape.tokens, left, right, 2)[way].flops
    return total


def test_gram_matrices_of_lora_layers_take_hundreds_of_gigaflops_and_products_two():
    assert lora_flops("product") == pytest.approx(2 * 1.14e9, rel=0.01)
    assert lora_flops("gram") == pytest.approx(744e9, rel=0.01)


def test_the_layers_of_a_model_hold_its_parameters():
    def parameters(model):
        counts = MODELS[model].items()
        shapes = [(LAYERS[layer], count) for layer, count in counts]
        return sum(count * 4 * (s.in_features + s.out_features) for s, count in shapes)

    assert sum(MODELS["sd15_512"].values()) == 128 and parameters("sd15_512") == 797_184
    assert sum(MODELS["sdxl_1024"].values()) == 560 and parameters("sdxl_1024") == 5_806_080


def test_ways_without_a_slab_read_the_rows_twice():
    ways = cost.ways(10, 3, 5, 2)
    assert ways["product"].bytes_moved == ways["gram"].bytes_moved == 2 * 10 * 8 * 2


def test_full_weights_take_gram_matrices_for_few_rows_and_products_for_many():
    def of(n_rows):
        return cost.cheapest(n_rows, 1280, 1280, 2)

    assert of(1) == of(16) == "gram"
    assert of(4096) == "product"
    # The ways cross where m² (L + D) = m L D.
    assert {of(600), of(680)} == {"gram", "product"}


@pytest.mark.parametrize("tokens", [2, 200], ids=["gram", "product"])
def test_the_norm_of_the_cheaper_way_is_never_below_the_exact_one(tokens):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(6, tokens, f, generator=generator) for f in (30, 20))
    ours = ops.weight_sq_norms(left, right, n_records=3).sum(1)
    exact = ops.per_record_product(left.double(), right.double(), n_records=3)
    exact = exact.flatten(1).norm(dim=1)
    assert (ours.sqrt() >= exact * (1 - 1e-6)).all()
    assert (ours.sqrt() <= exact * (1 + 1e-2)).all()
