"""Numbers as people write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_x.errors import ConfigError
from robustbench_x.numbers import format_eps, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("1e-2", 0.01), (".5", 0.5), ("-3/2", -1.5), (0.03, 0.03), (2, 2.0)],
)
def test_numbers_and_fractions_are_read(text: str | float, value: float) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "eight", "8/", "/255", "1/2/3", "8/0", "1..2/3", "8 255", "0x8"])
def test_what_is_no_number_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a number; write 0\.03 or a fraction such as 8/255"):
        parse_number(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", math.inf, math.nan])
def test_what_is_not_finite_is_refused(text: str | float) -> None:
    with pytest.raises(ConfigError, match="is not a finite number"):
        parse_number(text)


@given(st.integers(1, 64))
def test_whole_255ths_are_printed_as_such_and_read_back(steps: int) -> None:
    assert format_eps(steps / 255) == f"{steps}/255"
    assert parse_number(format_eps(steps / 255)) == steps / 255


@pytest.mark.parametrize(("eps", "text"), [(0.0, "0"), (1e-9, "1e-09"), (0.5, "0.5"), (3.0, "3"), (0.031, "0.031")])
def test_other_budgets_are_printed_as_decimals(eps: float, text: str) -> None:
    assert format_eps(eps) == text
