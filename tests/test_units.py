"""Who is one person: what machines write differently is one unit, what is doubtful is refused."""

import unicodedata

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpengine import DPDataLoader, PoissonSampler, PrivacyEngine
from dpengine.dropin.arguments import Arguments
from dpengine.dropin.loader import Rate
from dpengine.units import unit_numbers

JOSE = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]
ONE_PERSON = {
    "unicode forms": JOSE,
    "hangul": [unicodedata.normalize(form, "김민준") for form in ("NFC", "NFD")],
    "order of accents": ["a\u0323\u0307", "a\u0307\u0323"],
    "spaces around": ["al", "al ", " al", "al\t", "al\r", "al\u00a0", "\u3000al"],
    "spaces within": ["Al Bo", "Al  Bo", "Al\u00a0Bo", "Al\u202fBo", "Al\tBo"],
    "invisible": ["al", "\ufeffal", "a\u200bl", "a\u00adl", "al\u200e", "al\x00"],
    "accent behind what is invisible": ["José", "Jose\u200d\u0301"],
    "whole floats": ["1", "1.0", "1.000", " 1.0 "],
    "leading zeros kept": ["007", "007.0"],
    "types": [1, 1.0, "1", "1.0", b"1", np.int8(1), np.float32(1), np.str_("1"), np.uint64(1)],
    "bytes and text": [JOSE[0].encode(), JOSE[1]],
    "zeros": [0.0, -0.0, 0, "0"],
    "large": [2**63 + 1, str(2**63 + 1), np.uint64(2**63 + 1)],
}


@pytest.mark.parametrize("ids", ONE_PERSON.values(), ids=ONE_PERSON)
def test_one_person_is_one_unit(ids):
    assert unit_numbers(ids).tolist() == [0] * len(ids)
    assert unit_numbers([*ids, "another", *ids]).max() == 1


DOUBTFUL = {
    "case": ("Al", "AL"),
    "case of two letters": ("straße", "STRASSE"),
    "leading zero": ("1", "01"),
    "zeros within": ("P1", "P001"),
    "date": ("1-2", "01-02"),
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
def test_ids_that_may_be_one_person_are_refused_by_both_spellings(ids):
    for pair in (ids, ids[::-1]):
        with pytest.raises(ValueError, match="may be one person or two") as refusal:
            unit_numbers([*pair, "another"])
        assert all(ascii(str(spelled)) in str(refusal.value) for spelled in pair)
    for alone in ids:
        assert unit_numbers([alone, alone]).tolist() == [0, 0]


def test_persons_that_differ_stay_apart():
    ids = ["al", "bo", "Jose", "José", "a1", "a11", "1a", "1", "10", "1 0", "1.5", "-1", "Nan"]
    assert sorted(unit_numbers(ids)) == list(range(len(ids)))


@pytest.mark.parametrize(
    "ids",
    [
        [None, "a"],
        [float("nan"), 1.0],
        np.array([1.0, np.nan]),
        np.array(["a", None], object),
        ["", "a"],
        [" \u00a0\u200b", "a"],
        ["nan", "a"],
        ["NaN", "a"],
        ["None", "a"],
        ["<NA>", "a"],
        ["NULL ", "a"],
        np.ma.array([1, 2], mask=[False, True]),
    ],
    ids=str,
)
def test_missing_ids_are_refused(ids):
    """Nobody knows whose records they are: they may be anybody's who has others."""
    with pytest.raises(ValueError, match="unit_ids must name a person for each record"):
        unit_numbers(ids)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([True, 2], TypeError, "got bool"),
        (np.array([True, False]), TypeError, "got bool"),
        (np.array([np.bool_(True), 1], object), TypeError, "got bool"),
        ([1j, 2], TypeError, "got complex"),
        ([("a", 1), "b"], TypeError, "got tuple"),
        (np.array(["2020-01-01"], "M8[D]"), TypeError, "got datetime64"),
        ([0.5, 1.0], ValueError, "whole numbers below 2"),
        (np.array([0.5, 1.0]), ValueError, "whole numbers below 2"),
        (np.array([2.0**53]), ValueError, r"whole numbers below 2\*\*53"),
        (np.array([2.0**24], np.float32), ValueError, r"whole numbers below 2\*\*24"),
        ([1, np.float16(2**11)], ValueError, r"whole numbers below 2\*\*11"),
        ([float("inf")], ValueError, "whole numbers below 2"),
        ([b"\xff\xfe"], ValueError, "UTF-8"),
        (np.array([b"\xe9"]), ValueError, "UTF-8"),
        ([[1], [2]], ValueError, "one-dimensional"),
        (np.zeros((2, 1), int), ValueError, "one-dimensional"),
        (3, ValueError, "one-dimensional"),
        ("abc", ValueError, "one-dimensional"),
    ],
    ids=str,
)
def test_what_is_no_id_is_refused(ids, error, words):
    with pytest.raises(error, match=words):
        unit_numbers(ids)


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
    ],
    ids=["int64", "uint64", "float", "float32", "str", "bytes", "object", "tensor", "tuple"],
)
def test_ids_of_every_kind_become_dense_numbers(ids):
    numbers = unit_numbers(ids)
    assert numbers.dtype == np.int64
    assert sorted(set(numbers.tolist())) == [0, 1, 2]
    assert np.equal.outer(numbers, numbers).sum() == 6
    assert numbers[0] == numbers[2]
    assert np.array_equal(unit_numbers(numbers), numbers)


def test_no_record_has_no_unit():
    assert unit_numbers([]).tolist() == []


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
    with pytest.raises(ValueError, match="may be one person"):
        arguments(["Al", "al"])


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
