"""The plan: what it refuses, and the constants that follow from it."""

import dataclasses
import json
import math

import pytest

from dpengine.mechanism.plan import PrivacyPlan, check_delta


def plan(**changes):
    values = {
        "sampling_rate": 0.25,
        "noise_multiplier": 1.5,
        "num_steps": 10,
        "max_grad_norm": 0.1,
        "delta": 1e-4,
        "public_dataset_size": 1437,
        "adjacency": "add-remove",
        "draws_per_record": 4,
        "trainable_parameters": 100,
    }
    return PrivacyPlan(**(values | changes))


NOT_POSITIVE = [0, -1, math.nan, math.inf]
NO_COUNT = [0, -1, 1.5, True]
REFUSED = {
    "sampling_rate": [0, -0.1, 1.1, math.nan],
    "noise_multiplier": [-0.1, math.nan],
    "max_grad_norm": NOT_POSITIVE,
    "delta": [0, -1e-5, 1, math.nan, 1 / 1437],
    "num_steps": NO_COUNT,
    "public_dataset_size": NO_COUNT,
    "draws_per_record": NO_COUNT,
    "trainable_parameters": NO_COUNT,
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        plan(**{name: value})


@pytest.mark.parametrize("adjacency", ["replace", "", None])
def test_an_adjacency_that_the_accountant_does_not_know_is_refused(adjacency):
    with pytest.raises(ValueError, match="adjacency"):
        plan(adjacency=adjacency)


@pytest.mark.parametrize("unit", ["person", "", None, "Record"])
def test_a_unit_that_the_sampler_does_not_know_is_refused(unit):
    with pytest.raises(ValueError, match=r"^unit must be"):
        plan(unit=unit)


@pytest.mark.parametrize("rows_per_unit", NO_COUNT)
def test_the_rows_of_a_unit_are_a_count(rows_per_unit):
    with pytest.raises(ValueError, match=r"^rows_per_unit must be"):
        plan(unit="unit", rows_per_unit=rows_per_unit)


def test_a_record_that_is_its_own_unit_brings_one_row():
    assert plan().rows_per_unit == plan(unit="unit").rows_per_unit == 1
    assert plan(unit="unit", rows_per_unit=5).rows_per_unit == 5
    with pytest.raises(ValueError, match=r"^rows_per_unit must be 1 .* got 2.*unit_ids"):
        plan(rows_per_unit=2)


def test_a_plan_from_before_units_is_one_of_records():
    old = plan().to_dict()
    del old["unit"], old["rows_per_unit"]
    assert PrivacyPlan(**old) == plan(unit="record", rows_per_unit=1)


def test_an_infinite_noise_multiplier_is_refused():
    with pytest.raises(ValueError, match="noise_multiplier"):
        plan(noise_multiplier=math.inf)


@pytest.mark.parametrize(
    "changes",
    [{"noise_multiplier": 0}, {"sampling_rate": 1}, {"adjacency": "replace-one"}],
    ids=str,
)
def test_the_ends_of_the_ranges_are_accepted(changes):
    assert plan(**changes)


@pytest.mark.parametrize("rate", [0.25, 1, 1e-6])
def test_the_divisor_is_the_rate_times_the_public_size(rate):
    assert plan(sampling_rate=rate).expected_batch_size == rate * 1437


def test_the_plan_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().noise_multiplier = 0.1


def test_the_plan_survives_json():
    units = {"unit": "unit", "rows_per_unit": 3}
    original = plan(sampling_rate=0.1 + 0.2, noise_multiplier=math.pi, **units)
    assert PrivacyPlan(**json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize("size", [1, 10, 60_000])
def test_delta_stays_below_one_over_the_public_size(size):
    check_delta(math.nextafter(1 / size, 0), size)
    with pytest.raises(ValueError, match="delta"):
        check_delta(1 / size, size)


@pytest.mark.parametrize("size", [1, 7, 1437, 10**9])
def test_the_delta_that_a_refusal_suggests_is_accepted(size):
    with pytest.raises(ValueError, match="choose") as refusal:
        check_delta(1.0, size)
    check_delta(float(str(refusal.value).rsplit(maxsplit=1)[-1]), size)


def test_adaptive_clipping_noises_a_pair_more():
    """The count is noised as well; normals come in pairs."""
    flat, adaptive = plan(clipping="flat"), plan(clipping="adaptive")
    assert flat.noised_values == flat.trainable_parameters
    assert adaptive.noised_values == flat.trainable_parameters + 2
