"""Reads numbers as people write them: `8/255` is understood wherever a number is."""

import math
import re

from robustbench_x.errors import ConfigError

__all__ = ["format_eps", "parse_number"]

_FRACTION = re.compile(r"^\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*/\s*([\d.]+(?:[eE][+-]?\d+)?)\s*$")


def parse_number(value: str | float) -> float:
    """The finite float that `value` spells: `0.03`, `"8/255"` or `"1e-2"`.

    Raises:
        ConfigError: It is no number, not finite, or divides by zero.

    >>> parse_number("8/255") == 8 / 255
    True
    """
    try:
        if isinstance(value, str) and (match := _FRACTION.match(value)):
            number = float(match[1]) / float(match[2])
        else:
            number = float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"'{value}' is not a number; write 0.03 or a fraction such as 8/255") from None
    if not math.isfinite(number):
        raise ConfigError(f"'{value}' is not a finite number")
    return number


def format_eps(eps: float) -> str:
    """`eps` (in [0, 1] units) as people read it: `8/255` when it is a whole number of 255ths.

    >>> format_eps(4 / 255), format_eps(0.5)
    ('4/255', '0.5')
    """
    steps = eps * 255
    if abs(steps - round(steps)) < 1e-6 and 1 <= round(steps) <= 64:
        return f"{round(steps)}/255"
    return f"{eps:g}"
