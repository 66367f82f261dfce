"""Spellings of one person make one unit; what may be one person is refused."""

import numpy as np
import pytest

from dpengine import PoissonSampler
from dpengine.dropin.loader import DPDataLoader, Rate
from dpengine.units import number_units

JOSE = ("Jos\u00e9", "Jose\u0301")


@pytest.mark.parametrize(
    "ids",
    [
        JOSE,
        ("1", "1.0", " 1", "1\u00a0", "1.", "\ufeff1"),
        ("Anna  Mayer", "Anna\u00a0Mayer", "Anna\u200b Mayer ", "Anna\tMayer"),
        (b"a", "a"),
        (1, 1.0, "1", b"1.0"),
        (-3, "-3.00"),
    ],
    ids=["unicode forms", "integral", "spaces", "bytes", "types", "negative"],
)
def test_spellings_of_one_person_are_one_unit(ids):
    assert number_units(np.array([*ids, "someone else"], dtype=object)).tolist() in (
        [0] * len(ids) + [1],
        [1] * len(ids) + [0],
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1", "p1"),
        ("007", "7"),
        ("P-01", "P-1"),
        ("\ufb01n", "fin"),
        ("ＡＢ", "AB"),
        ("Straße", "STRASSE"),
    ],
)
def test_what_may_be_one_person_is_refused_without_naming_anybody(one, other):
    with pytest.raises(ValueError, match=r"record 0 and record 2 ids that may be one") as refusal:
        number_units([one, "x", other])
    assert one not in str(refusal.value) and other not in str(refusal.value)


@pytest.mark.parametrize(
    "ids", [["1.05", "1.5"], ["a1", "a10"], ["10", "1"], ["ab", "a b"]], ids=str
)
def test_different_ids_stay_different(ids):
    assert len(set(number_units(ids).tolist())) == 2


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), 0.5, 2.0**53, None, True, "", " \u200b", b"\xff", ("a",)],
    ids=str,
)
def test_what_names_nobody_is_refused(bad):
    ids = np.empty(2, dtype=object)
    ids[:] = ["a", bad]
    with pytest.raises(ValueError, match="ids, at b, must"):
        number_units(ids, "ids", ["a", "b"])


def test_whole_columns_of_numbers_are_numbered_as_they_compare():
    ids = np.array([5.0, 7.0, 5.0, -1.0])
    assert number_units(ids).tolist() == number_units(ids.astype(int)).tolist() == [1, 2, 1, 0]
    assert number_units([]).shape == (0,)
    with pytest.raises(ValueError, match=r"one-dimensional, got shape \(2, 1\)"):
        number_units(np.ones((2, 1)))


def test_a_million_ids_take_seconds():
    """Numbers and texts alike: none of it grows with units times records."""
    ids = np.char.mod("p%d", np.arange(200_000) % 50_000)
    assert number_units(ids).max() == 49_999


def test_samplers_and_loaders_of_ones_own_loop_count_persons():
    rate = Rate(1.0, "unit", 1)
    sampler = PoissonSampler(
        2,
        rate,
        num_steps=1,
        physical_batch_size=4,
        reserve=lambda: None,
        announce=lambda notice: None,
        unit_ids=np.array(JOSE),
    )
    (batch,) = sampler
    assert len(batch.indices) == 1
    loader = DPDataLoader([0.0, 1.0], sample_rate=0.5, unit_ids=np.array(JOSE))
    assert loader.batch_sampler.expected_batch_size == 0.5
