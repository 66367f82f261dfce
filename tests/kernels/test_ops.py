"""The argument checks of the ops: each refusal names the arguments and their shapes."""

import math

import pytest
import torch

from dpengine.kernels import ops


def lora_shapes(**changes):
    shapes = {
        "activations": (6, 4, 5),
        "backprops": (6, 4, 7),
        "lora_a": (2, 5),
        "lora_b": (7, 2),
    }
    return {name: torch.ones(shape) for name, shape in (shapes | changes).items()}


@pytest.mark.parametrize(
    ("changes", "n_records", "message"),
    [
        ({"backprops": (6, 3, 7)}, 3, r"activations and backprops.*\(6, 4, 5\).*\(6, 3, 7\)"),
        ({"backprops": (5, 4, 7)}, 3, "activations and backprops"),
        ({"lora_a": (2, 4)}, 3, r"lora_a.*\(2, 4\)"),
        ({"lora_a": (3, 5)}, 3, "lora_a"),
        ({"lora_b": (2, 7)}, 3, r"lora_b.*\(2, 7\)"),
        ({}, 4, "n_records.*6 rows, got 4"),
        ({}, 0, "n_records.*got 0"),
        ({}, -3, "n_records.*got -3"),
    ],
    ids=["tokens", "rows", "in", "rank", "transposed", "divisor", "zero", "negative"],
)
def test_lora_shapes_that_do_not_fit_are_refused(changes, n_records, message):
    with pytest.raises(ValueError, match=message):
        ops.lora_per_record_grads(**lora_shapes(**changes), scaling=1.0, n_records=n_records)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan], ids=str)
def test_a_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match=f"max_grad_norm.*{bound}"):
        ops.clip_factors(torch.ones(2, dtype=torch.float64), bound)


@pytest.mark.parametrize("grads", [[], [torch.ones(2, 3), torch.ones(3, 3)]], ids=["none", "mixed"])
def test_tensors_without_one_number_of_records_are_refused(grads):
    with pytest.raises(ValueError, match="per_record_grads"):
        ops.sq_norms(grads)
    with pytest.raises(ValueError, match="per_record_grads"):
        ops.weighted_sum(grads, torch.ones(2), torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(("n_weights", "n_keep"), [(1, 2), (2, 1), (3, 3)])
def test_weights_and_keep_need_one_entry_for_each_record(n_weights, n_keep):
    keep = torch.ones(n_keep, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"weights and keep.*2 records"):
        ops.weighted_sum([torch.ones(2, 3)], torch.ones(n_weights), keep)
