"""The protocol error, and checks of numeric arguments that name argument, rule and value."""

import math
from numbers import Real


class PrivacyError(RuntimeError):
    """The privacy protocol was broken: going on would void the guarantee."""


def positive(**values: float) -> None:
    """Raise ValueError for any value that is not finite and > 0."""
    for name, value in values.items():
        _number(name, value)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


def not_negative(**values: float) -> None:
    """Raise ValueError for any value that is not finite and >= 0."""
    for name, value in values.items():
        _number(name, value)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def positive_int(**values: int) -> None:
    """Raise ValueError for any value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


def probability(**values: float) -> None:
    """Raise ValueError for any value outside (0, 1]."""
    for name, value in values.items():
        _number(name, value)
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
