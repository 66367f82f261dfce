"""Who is one person: ids as people write them, made numbers of units."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

_KINDS = int | np.integer | float | np.floating | str | bytes
_INTEGRAL = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_MISSING = re.compile(r"-?(nan|NaN)|[Nn]one|NULL|null|NA|<NA>|N/A|n/a|NaT|#N/?A( N/A)?")
"""How tables write that there is no value, as pandas reads them."""
_LOOK_ALIKE = str.maketrans(
    dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015, 0x2212), "-")
    | dict.fromkeys((0x2018, 0x2019, 0x02BC, 0x0060), "'")
    | dict.fromkeys((0x201C, 0x201D), '"')
    | dict.fromkeys((0xFE0E, 0xFE0F))
)
"""Dashes and quotes of other code points, and the two styles of an emoji."""


def number_units(
    unit_ids: Iterable[Any], source: str = "unit_ids", records: Sequence[str] | None = None
) -> np.ndarray:
    """Number the units that ``unit_ids`` name, one id for each record.  int64 [N], 0 to U - 1

    Ids are whole numbers or texts. Two of them name one unit where they differ only by the Unicode
    form of a character, by spaces around or within, by characters without width, or by a decimal
    point without decimals: `1`, `1.0` and ` 1` are one person. To take two spellings of one person
    for two units would halve the protection of that person in silence; so ids of which that cannot
    be excluded, as they differ only by case, by leading zeros, by a compatibility form of a
    character, by the kind of a dash or quote, or as one number is written, are refused. Other
    spellings (a typing error, another alphabet, a married name) are units of their own.

    Raises ValueError for those, and for an id that is missing, empty, a word that tables write for
    no value, or no whole number. It names ``source`` and the records, by ``records`` or by number,
    and never an id: ids name persons.
    """
    ids = _as_array(unit_ids, source)
    if ids.dtype.kind in "iu":
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    first, places = _distinct(ids)
    whose = [f"record {n}" if records is None else records[n] for n in first]
    names = [_name(ids[n], f"{source}, at {of},") for n, of in zip(first, whose, strict=True)]
    _refuse_doubtful(names, whose, source)
    return np.unique(np.array(names, str), return_inverse=True)[1].astype(np.int64)[places]


def _as_array(unit_ids: Iterable[Any], source: str) -> np.ndarray:
    if np.ma.is_masked(unit_ids):
        raise ValueError(f"{source} must name a unit for every record, got a masked id")
    # Of a list numpy would make True a 1, and None beside texts the text "None".
    is_list = isinstance(unit_ids, Iterable) and not isinstance(unit_ids, str | bytes)
    is_list = is_list and not hasattr(unit_ids, "__array__")
    ids = np.array(list(unit_ids), dtype=object) if is_list else np.asarray(unit_ids)
    if ids.ndim != 1:
        raise ValueError(
            f"{source} must be one-dimensional, one id for each record, got {ids.ndim} dimensions"
        )
    return ids


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each different id comes first, and for each record which of these its id is."""
    numbers: dict[Any, int] = {}
    # 1, True and 1.0 are equal keys, and the second is no id; what is no id may be no key.
    keys = ((type(v), v if isinstance(v, _KINDS) else None) for v in ids)
    places = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return np.unique(places, return_index=True)[1], places


def _name(value: Any, source: str) -> str:
    """One spelling for all those that surely name the same unit."""
    if isinstance(value, bool) or not isinstance(value, _KINDS):
        raise ValueError(
            f"{source} must hold whole numbers or texts, got a {type(value).__name__}; give each "
            "record the id of its unit"
        )
    if isinstance(value, float | np.floating):
        exact = 2.0 ** (np.finfo(type(value)).nmant + 1)
        if not (float(value).is_integer() and abs(value) < exact):
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
    # Before the form: a character without width keeps an accent from its letter.
    text = "".join(
        c for c in str(value) if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf")
    )
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text or _MISSING.fullmatch(text):
        raise ValueError(
            f"{source} must name a unit for every record, got an empty id or a word such as NaN "
            "that stands for none; give every record an id, its own where it is a unit's only one"
        )
    integral = _INTEGRAL.fullmatch(text)
    return integral[1] if integral else text


def _refuse_doubtful(names: list[str], whose: list[str], source: str) -> None:
    """Raise ValueError where two names may well be spellings of one unit."""
    seen: dict[Any, tuple[str, str]] = {}
    for name, record in zip(names, whose, strict=True):
        other, before = seen.setdefault(_loosely(name), (name, record))
        if other != name:
            raise ValueError(
                f"{source} gives {before} and {record} ids that may be one unit spelt in two ways: "
                "they differ by case, leading zeros, the way a number is written or the form of a "
                "character alone; write one unit in one way, and make ids of two units differ by "
                "more"
            )


def _loosely(name: str) -> Any:
    """What names share that may be one unit's: a number, or a text without case and form."""
    text = unicodedata.normalize("NFKC", name).translate(_LOOK_ALIKE)
    try:
        number = Decimal(text.replace(",", "."))
        if number.is_finite():
            return number
    except InvalidOperation:
        pass
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", text).casefold())
    return _LEADING_ZEROS.sub("", " ".join(folded.split()))
