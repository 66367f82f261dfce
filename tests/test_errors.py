"""Checks of numeric arguments: what is refused, and that the sentence names it."""

import math

import pytest

from dpengine.errors import PrivacyError, positive, positive_int, probability


@pytest.mark.parametrize("value", [0, 0.0, -1, -1e-300, math.inf, -math.inf, math.nan], ids=str)
def test_positive_refuses(value):
    with pytest.raises(ValueError, match=f"^size must be .* got {value}$"):
        positive(size=value)


@pytest.mark.parametrize("value", [0, -3, 1.0, 2.5, math.nan, math.inf, True, "3"], ids=str)
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match=f"^count must be .* got {value}$"):
        positive_int(count=value)


@pytest.mark.parametrize("value", [0, -0.5, 1.0000001, 2, math.nan, math.inf], ids=str)
def test_probability_refuses(value):
    with pytest.raises(ValueError, match=f"^rate must be .* got {value}$"):
        probability(rate=value)


def test_values_in_range_pass():
    positive(a=1e-300, b=7)
    positive_int(a=1, b=10**30)
    probability(a=1e-300, b=1)


def test_the_bad_one_of_several_is_named():
    with pytest.raises(ValueError, match="second"):
        positive(first=1.0, second=-1.0, third=1.0)


def test_a_privacy_error_is_no_value_error():
    # Code that forgives bad input must not forgive a broken protocol.
    assert not issubclass(PrivacyError, ValueError)
