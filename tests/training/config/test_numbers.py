import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yopo_ext.training.numbers import parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e-3", 1e-3),
        ("-2/4", -0.5),
        ("1.5e1/3", 5.0),
        (3, 3.0),
        (0.25, 0.25),
    ],
)
def test_numbers_and_fractions(text, value):
    assert parse_number(text) == value


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_any_fraction(numerator, denominator):
    assert parse_number(f"{numerator}/{denominator}") == numerator / denominator


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives_its_own_text(value):
    assert parse_number(repr(value)) == value


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "8/",
        "/255",
        "8/0",
        "1/2/3",
        "0x10",
        "nan",
        "inf",
        "1e999",
        "__import__('os')",
        "2**3",
        "1_000",
        None,
        True,
        [1],
    ],
)
def test_everything_else_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="eps must be a number or a fraction such as 8/255"):
        parse_number(bad, "eps")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_floats_must_be_finite(bad):
    with pytest.raises(ValueError, match="must be a number"):
        parse_number(bad)
