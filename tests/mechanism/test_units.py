"""Spellings of one person make one unit; what may be one person is refused."""

import unicodedata

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpengine import DPDataLoader, PoissonSampler, PrivacyEngine
from dpengine.dropin.arguments import Arguments
from dpengine.dropin.loader import Rate
from dpengine.mechanism.units import number_units

JOSE = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]
ONE_PERSON = {
    "unicode forms": JOSE,
    "hangul": [unicodedata.normalize(form, "김민준") for form in ("NFC", "NFD")],
    "order of accents": ["a\u0323\u0307", "a\u0307\u0323"],
    "spaces around": ["al", "al ", " al", "al\t", "al\r", "al\u00a0", "\u3000al"],
    "spaces within": ["Al Bo", "Al  Bo", "Al\u00a0Bo", "Al\u202fBo", "Al\tBo", "Al\u200b Bo "],
    "invisible": ["al", "\ufeffal", "a\u200bl", "a\u00adl", "al\u200e", "al\x00"],
    "accent behind what is invisible": ["José", "Jose\u200d\u0301"],
    "whole floats": ["1", "1.0", "1.000", " 1.0 ", "1.", "1\u00a0", "\ufeff1"],
    "negative": [-3, "-3.00"],
    "leading zeros kept": ["007", "007.0"],
    "types": [1, 1.0, "1", "1.0", b"1", np.int8(1), np.float32(1), np.str_("1"), np.uint64(1)],
    "bytes and text": [JOSE[0].encode(), JOSE[1]],
    "zeros": [0.0, -0.0, 0, "0"],
    "large": [2**63 + 1, str(2**63 + 1), np.uint64(2**63 + 1)],
}


@pytest.mark.parametrize("ids", ONE_PERSON.values(), ids=ONE_PERSON)
def test_spellings_of_one_person_are_one_unit(ids):
    assert number_units(ids).tolist() == [0] * len(ids)
    assert sorted(set(number_units([*ids, "another", *ids]).tolist())) == [0, 1]
    assert number_units(np.array([*ids, "another"], dtype=object)).max() == 1


DOUBTFUL = {
    "case": ("Al", "AL"),
    "case of two letters": ("straße", "STRASSE"),
    "leading zero": ("1", "01"),
    "zeros within": ("P1", "P001"),
    "date": ("1-2", "01-02"),
    "date with points": ("1.2.2020", "01.02.2020"),
    "full width": ("1", "\uff11"),
    "full width letters": ("A1", "\uff21\uff11"),
    "ligature": ("\ufb01n", "fin"),
    "superscript": ("x2", "x\u00b2"),
    "other digits": ("12", "\u0661\u0662"),
    "sign": ("1", "+1"),
    "exponent": ("100000", "1e5"),
    "decimals": ("1.1", "1.10"),
    "decimal comma": ("1", "1,0"),
    "dash": ("a-1", "a\u20131"),
    "hyphen that does not break": ("a-1", "a\u20111"),
    "quote": ("O'Hara", "O\u2019Hara"),
    "emoji style": ("\u2764", "\u2764\ufe0f"),
    "case and form": ("JOSÉ", JOSE[1]),
    "number and text": (1, "01"),
}


@pytest.mark.parametrize("ids", DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_may_be_one_person_is_refused_without_naming_anybody(ids):
    for one, other in (ids, ids[::-1]):
        with pytest.raises(ValueError, match=r"u gives A and C ids that may be one") as refusal:
            number_units([one, "Mayer", other], "u", ["A", "B", "C"])
        assert not any(str(spelt) in str(refusal.value) for spelt in (one, other, "Mayer"))
    for alone in ids:
        assert number_units([alone, alone]).tolist() == [0, 0]


def test_different_ids_stay_different():
    ids = ["al", "bo", "Jose", "José", "a1", "a11", "1a", "1", "10", "1 0", "1.5", "1.05", "-1"]
    ids += ["a b", "ab", "Nan", "Nil"]
    assert sorted(number_units(ids)) == list(range(len(ids)))


@pytest.mark.parametrize(
    "bad",
    [
        *(None, float("nan"), "", " \u00a0\u200b", "nan", "-nan", "NaN", "None", "none", "<NA>"),
        *("NULL ", "NA", "n/a", "NaT", "#N/A", float("inf"), 0.5, 2.0**53, np.float32(2**24)),
        *(np.float16(2**11), True, np.bool_(True), 1j, b"\xff", ("a",), ["a"], ("a", ["b"])),
        np.datetime64("2020-01-01"),
    ],
    ids=repr,
)
def test_what_names_nobody_is_refused(bad):
    """Nobody knows whose a record without an id is: it may be anybody's who has others."""
    ids = np.empty(3, dtype=object)
    ids[:] = ["a", bad, "c"]
    for given in (ids, list(ids)):
        with pytest.raises(ValueError, match="ids, at B, must"):
            number_units(given, "ids", ["A", "B", "C"])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([True, 2], "got a bool"),
        (np.array([True, False]), "got a bool"),
        ([None, "a"], "got a NoneType"),
        (np.array(["2020-01-01"], "M8[D]"), "got a datetime64"),
        (np.array([1.0, np.nan]), "missing id"),
        (np.array([2.0**53]), "cannot tell from its neighbours"),
        (np.array([2.0**24], np.float32), "cannot tell from its neighbours"),
        (np.array([b"\xe9"]), "UTF-8"),
        (np.ma.array([1, 2], mask=[False, True]), "masked"),
        (np.zeros((7, 1), int), "one-dimensional, one id for each record, got 2 dimensions"),
        (3, "one-dimensional"),
        ("abc", "one-dimensional"),
    ],
    ids=str,
)
def test_what_holds_no_ids_is_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        number_units(ids)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([7, -2, 7, 900]),
        np.array([2**64 - 1, 0, 2**64 - 1, 2**63], np.uint64),
        np.array([7.0, -2.0, 7.0, 900.0]),
        np.array([7.0, -2.0, 7.0, 2.0**24 - 1], np.float32),
        np.array(["zoe", "al", "zoe", "bo"]),
        np.array([b"zoe", b"al", b"zoe", b"bo"]),
        np.array(["zoe", 1, "zoe", 2], object),
        torch.tensor([7, -2, 7, 900]),
        ("zoe", "al", "zoe", "bo"),
        iter(["zoe", "al", "zoe", "bo"]),
    ],
    ids=[
        "int64",
        "uint64",
        "float",
        "float32",
        "str",
        "bytes",
        "object",
        "tensor",
        "tuple",
        "iter",
    ],
)
def test_ids_of_every_kind_become_dense_numbers(ids):
    numbers = number_units(ids)
    assert numbers.dtype == np.int64
    assert sorted(set(numbers.tolist())) == [0, 1, 2]
    assert np.equal.outer(numbers, numbers).sum() == 6
    assert numbers[0] == numbers[2]
    assert np.array_equal(number_units(numbers), numbers)


def test_whole_columns_of_numbers_are_numbered_as_they_compare():
    ids = np.array([5.0, 7.0, 5.0, -1.0])
    assert set(number_units(ids).tolist()) == {0, 1, 2}
    assert number_units(ids.astype(int)).tolist() == [1, 2, 1, 0]
    assert number_units([]).shape == (0,)


def test_a_million_ids_take_seconds():
    """Numbers and texts alike: none of it grows with units times records."""
    ids = np.char.mod("p%d", np.arange(200_000) % 50_000)
    assert number_units(ids).max() == 49_999


def arguments(ids):
    module = torch.nn.Linear(2, 1)
    given = {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "data_loader": DataLoader(TensorDataset(torch.ones(len(ids), 2)), batch_size=1),
        "max_grad_norm": 1.0,
        "unit_ids": ids,
    }
    return Arguments.of(given), given


def test_the_drop_in_counts_persons_and_not_spellings():
    ids = [*JOSE, "1", 1.0]
    checked, given = arguments(ids)
    assert (checked.n_units, checked.rate.sampling_rate) == (2, 0.5)
    _, _, loader = PrivacyEngine().make_private(**given, noise_multiplier=1.0)
    assert len(np.unique(loader.batch_sampler.unit_ids)) == 2
    own = DPDataLoader(TensorDataset(torch.ones(4, 2)), sample_rate=0.5, unit_ids=ids)
    assert own.batch_sampler.expected_batch_size == 1.0
    with pytest.raises(ValueError, match="may be one unit"):
        arguments(["Al", "al"])


def test_no_repr_tells_a_record_or_whose_it_is():
    ids = ["Mayer", "Mayer", *range(1000, 1035)]
    checked, given = arguments(ids)
    loader = PrivacyEngine().make_private(**given, noise_multiplier=1.0)[2]
    own = DPDataLoader(["Huber"] * 37, sample_rate=0.5, unit_ids=ids)
    holders = (checked, loader.batch_sampler, loader.collate_fn, own.batch_sampler, own.collate_fn)
    for told in ("Mayer", "Huber", "1000", "unit_ids", "array", "37"):
        assert not any(told in repr(holder) for holder in holders)


def test_the_sampler_tosses_one_coin_for_one_person():
    notices = []
    sampler = PoissonSampler(
        4,
        Rate(1.0, "unit", 2),
        num_steps=5,
        physical_batch_size=4,
        reserve=lambda: None,
        announce=notices.append,
        unit_ids=np.array([*JOSE, "1", 1.0], dtype=object),
    )
    for batch in sampler:
        assert sorted(sorted(unit.tolist()) for unit in batch.indices) == [[0, 1], [2, 3]]
    assert [notice.n_records.reveal() for notice in notices] == [2] * 5
