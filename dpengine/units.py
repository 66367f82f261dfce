"""Whose each record is: ids that mean one person become one number."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

_MISSING = re.compile(r"-?(nan|NaN)|[Nn]one|NULL|null|NA|<NA>|N/A|n/a|NaT|#N/?A( N/A)?")
"""How tables write that there is no value, as pandas reads them."""

_PLAIN = str.maketrans(
    dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015, 0x2212), "-")
    | dict.fromkeys((0x2018, 0x2019, 0x02BC, 0x0060), "'")
    | dict.fromkeys((0x201C, 0x201D), '"')
)
_EMOJI_STYLES = "\ufe0e\ufe0f"
_WHOLE_FLOAT = re.compile(r"([+-]?[0-9]+)\.0+", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")


def unit_numbers(unit_ids: Any) -> np.ndarray:
    """Number the units that ``unit_ids`` name, so that one person has one number.

    unit_ids: [N] whole numbers or texts, one for each record: a list, an array, or what becomes
    one. Floats must be whole and exact (below 2**53, 2**24 in float32); bytes are texts in UTF-8.
    -> int64 [N], 0 to U - 1, each taken.

    Ids are one unit's where they differ only in how a machine writes them: Unicode form (NFC),
    whitespace around them or its kind and length within, invisible characters, a number's type
    (1, 1.0, "1", "1.0"). More ids in one unit than there are persons only protects more.

    Raises ValueError for ids that may be one person's or two: they differ only in case, leading
    zeros, compatibility forms of characters, kinds of dashes or quotes, or as numbers are
    written; and for missing ids. Raises TypeError for ids of another type, a bool among them.

    Guarantee: records whose ids differ only in these ways never become two units. Other spellings
    (a typing error, another alphabet, a married name) are units of their own.
    """
    array = _as_array(unit_ids)
    if array.dtype.kind in "iu":
        return _dense(array)
    places: Any = slice(None)
    if array.dtype.kind in "fUS":
        # Many records have few ids: read each of these once.
        array, places = np.unique(array, return_inverse=True)
    spelled = [_text(value) for value in array]
    names = [_one_spelling(text) for text in spelled]
    _refuse_doubtful(zip(names, spelled, strict=True))
    return _dense(np.array(names, dtype=str)[places])


def _dense(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _as_array(unit_ids: Any) -> np.ndarray:
    if np.ma.is_masked(unit_ids):
        raise ValueError(_missing("a masked value"))
    # numpy would turn a list's True into 1, and its None, beside texts, into "None".
    is_array = hasattr(unit_ids, "__array__") or isinstance(unit_ids, str | bytes)
    is_array = is_array or not isinstance(unit_ids, Iterable)
    array = np.asarray(unit_ids) if is_array else np.array(list(unit_ids), dtype=object)
    if array.ndim != 1:
        raise ValueError(
            "unit_ids must be one-dimensional, with one id for each record, got an array of "
            f"{array.ndim} dimensions"
        )
    if array.dtype.kind not in "iufSUTO":
        raise TypeError(_type_rule(array.dtype))
    return array


def _text(value: Any) -> str:
    """One id as text; a whole number as its digits."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"unit_ids that are bytes must be text in UTF-8, got {value!r}; give them as str"
            ) from None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    if value is None:
        raise ValueError(_missing("None"))
    if not isinstance(value, float | np.floating):
        raise TypeError(_type_rule(type(value).__name__))
    if np.isnan(value):
        raise ValueError(_missing("NaN"))
    digits = np.finfo(type(value)).nmant + 1
    # Beyond, whole numbers share a float with their neighbours.
    if not float(value).is_integer() or abs(value) >= 2.0**digits:
        raise ValueError(
            f"unit_ids that are floats must be whole numbers below 2**{digits}, got {value}; give "
            "whole numbers or texts"
        )
    return str(int(value))


def _one_spelling(text: str) -> str:
    """The id without what only machines put into it."""
    visible = "".join(
        character
        for character in text
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf")
    )
    # Only now, for an invisible character keeps an accent from its letter.
    name = " ".join(unicodedata.normalize("NFC", visible).split())
    if not name or _MISSING.fullmatch(name):
        raise ValueError(_missing(ascii(text)))
    whole = _WHOLE_FLOAT.fullmatch(name)
    return whole[1] if whole else name


def _refuse_doubtful(ids: Iterable[tuple[str, str]]) -> None:
    first: dict[object, tuple[str, str]] = {}
    for name, spelled in ids:
        known, as_spelled = first.setdefault(_loosely(name), (name, spelled))
        if known != name:
            raise ValueError(
                f"unit_ids {as_spelled!a} and {spelled!a} may be one person or two: they "
                "differ only in case, leading zeros or the kind of their characters; write one "
                "person's ids alike, and number persons whose ids are so near"
            )


def _loosely(name: str) -> object:
    """What ids share that may be one person's: a number, or a text without case and form."""
    text = unicodedata.normalize("NFKC", name).translate(_PLAIN)
    try:
        number = Decimal(text.replace(",", "."))
        if number.is_finite():
            return number
    except InvalidOperation:
        pass
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", text).casefold())
    shown = "".join(character for character in folded if character not in _EMOJI_STYLES)
    return _LEADING_ZEROS.sub("", " ".join(shown.split()))


def _type_rule(got: object) -> str:
    return f"unit_ids must be whole numbers or strings, one for each record, got {got}"


def _missing(got: str) -> str:
    return (
        f"unit_ids must name a person for each record, got {got}, which stands for no value; give "
        "every record an id, its own where it is a person's only one"
    )
