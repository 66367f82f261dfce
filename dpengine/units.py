"""Who is one person: ids as people write them, made numbers of units."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_INTEGRAL = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_LARGEST_EXACT = 2.0**53


def number_units(
    unit_ids: Iterable[Any], source: str = "unit_ids", records: Sequence[str] | None = None
) -> np.ndarray:
    """Number the units that ``unit_ids`` name, one id for each record.  int64 [N], 0 to U - 1

    Ids are whole numbers or texts. Two of them name one unit where they differ only by the Unicode
    form of a character, by spaces around or within, by characters without width, or by a decimal
    point without decimals: `1`, `1.0` and ` 1` are one person. To take two spellings of one person
    for two units would halve the protection of that person in silence; so ids of which that cannot
    be excluded, as they differ only by case, by leading zeros or by a compatibility form of a
    character, are refused.

    Raises ValueError for those, and for an id that is missing, empty, or no whole number. It names
    ``source`` and the records, by ``records`` or by number, and never an id: ids name persons.
    """
    ids = np.asarray(unit_ids)
    if ids.ndim != 1:
        raise ValueError(f"{source} must be one-dimensional, got shape {ids.shape}")
    if ids.dtype.kind in "iu":
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    spelt, places = _distinct(ids)
    if not spelt:
        return places
    first = np.unique(places, return_index=True)[1].tolist()
    whose = [f"record {n}" if records is None else records[n] for n in first]
    names = [_name(value, f"{source}, at {of},") for value, of in zip(spelt, whose, strict=True)]
    _refuse_doubtful(names, whose, source)
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)[places]


def _distinct(ids: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The different values of ``ids``, and the place among them of each."""
    numbers: dict[Any, int] = {}
    # 1, True and 1.0 are equal keys, and the second is no id.
    places = [numbers.setdefault((type(v), v), len(numbers)) for v in ids.tolist()]
    return [value for _, value in numbers], np.array(places, dtype=np.int64)


def _name(value: Any, source: str) -> str:
    """One spelling for all those that surely name the same unit."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | bytes):
        raise ValueError(
            f"{source} must hold whole numbers or texts, got a {type(value).__name__}; give each "
            "record the id of its unit"
        )
    if isinstance(value, float):
        if not (value.is_integer() and abs(value) < _LARGEST_EXACT):
            raise ValueError(
                f"{source} must hold whole numbers or texts, got a missing id, a fraction, or a "
                "number that floating point cannot tell from its neighbours; give ids as text"
            )
        return str(int(value))
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{source} must be text in UTF-8") from None
    text = "".join(c for c in str(value) if unicodedata.category(c) != "Cf")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise ValueError(f"{source} must name a unit for every record, got an empty id")
    integral = _INTEGRAL.fullmatch(text)
    return integral[1] if integral else text


def _refuse_doubtful(names: list[str], whose: list[str], source: str) -> None:
    """Raise ValueError where two names may well be spellings of one unit."""
    seen: dict[str, tuple[str, str]] = {}
    for name, record in zip(names, whose, strict=True):
        alike = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        alike = _LEADING_ZEROS.sub("", alike).removeprefix("+")
        other, before = seen.setdefault(alike, (name, record))
        if other != name:
            raise ValueError(
                f"{source} gives {before} and {record} ids that may be one unit spelt in two ways: "
                "they differ by case, leading zeros or the form of a character alone; write one "
                "unit in one way, and make ids of two units differ by more"
            )
