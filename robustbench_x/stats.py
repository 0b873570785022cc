"""Intervals and tests for rates: how far a measured number can be trusted.

Wilson (1927) for one rate, Tango (1998) for the change of a rate measured twice on the same samples, and the
exact form of McNemar's test (1947).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from scipy.special import bdtr

__all__ = ["Interval", "bounded_mean", "mcnemar_exact", "paired_difference", "samples_to_decide", "wilson"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value and its confidence interval.

    `value` None means "not measured", which is neither 0 nor 1; `low` and `high` None mean that the value has
    no interval.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The rate `successes / n` with its Wilson score interval; "not measured" when `n` is 0.

    >>> wilson(0, 10).low
    0.0

    Raises:
        ValueError: The counts are no counts, or `confidence` lies outside (0, 1).
    """
    _check_counts(successes, n)
    z = _quantile(confidence)
    if n == 0:
        return Interval()
    low, high = _wilson_bounds(successes / n, n, z)
    # Both ends are exact here; rounding would leave 1e-17 and a gate `min = 1` would never hold.
    return Interval(value=successes / n, low=0.0 if successes == 0 else low, high=1.0 if successes == n else high)


def bounded_mean(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of values in [0, 1] with Wilson's interval for a rate of that size; "not measured" without values.

    Of all variables in [0, 1] with a given mean a rate varies most, so the interval is wider than it need be.

    Raises:
        ValueError: A value lies outside [0, 1], or `confidence` outside (0, 1).
    """
    z = _quantile(confidence)
    if not len(values):
        return Interval()
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"values must lie in [0, 1], got [{min(values)}, {max(values)}]")
    mean = math.fsum(values) / len(values)
    low, high = _wilson_bounds(mean, len(values), z)
    return Interval(value=mean, low=0.0 if mean == 0 else low, high=1.0 if mean == 1 else high)


def paired_difference(b: int, c: int, n: int, confidence: float = 0.95) -> Interval:
    """The change of an error rate from A to B, `(c - b) / n`, with Tango's score interval.

    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998), equations 8 to 11. Unlike Wald's it keeps its coverage when few
    samples disagree, and has a width when none does.

    Args:
        b: Samples that are wrong in A only.
        c: Samples that are wrong in B only.
        n: All samples, measured in both.
        confidence: In (0, 1).

    Raises:
        ValueError: The counts are no counts, or more samples disagree than there are.
    """
    _check_counts(b + c if min(b, c) >= 0 else -1, n)
    z = _quantile(confidence)
    if n == 0:
        return Interval()
    value = (c - b) / n

    def inside(delta: float) -> bool:
        return abs(c - b - n * delta) <= z * math.sqrt(n * _tango_variance(c, b, n, delta))

    return Interval(value=value, low=_boundary(inside, value, -1.0), high=_boundary(inside, value, 1.0))


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p-value of "A and B err equally often", from the samples on which only one of them errs.

    Raises:
        ValueError: A count is negative.
    """
    if min(b, c) < 0:
        raise ValueError(f"counts cannot be negative, got b={b}, c={c}")
    # The two tails overlap when b = c, where the doubled one exceeds 1.
    return min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5)))


def samples_to_decide(successes: int, n: int, threshold: float, confidence: float = 0.95) -> int | None:
    """The smallest sample size at which the Wilson interval around the same rate would clear `threshold`.

    Clearing means that the threshold is not strictly inside the interval. The rate is kept as it is, even where
    no whole number of successes gives it. None when no sample size would do: the rate equals the threshold
    to 15 digits, or there is no rate (`n` is 0).

    Raises:
        ValueError: The counts are no counts, or `threshold` is not finite.
    """
    _check_counts(successes, n)
    if not math.isfinite(threshold):
        raise ValueError(f"the threshold must be finite, got {threshold}")
    z = _quantile(confidence)
    rate = successes / n if n else threshold
    # Squared, since a gap of 1e-200 is as good as none.
    if (gap := (rate - threshold) ** 2) < 1e-30:
        return None
    if not 0 < threshold < 1:
        return 1

    def clears(size: int) -> bool:
        low, high = _wilson_bounds(rate, size, z)
        return high <= threshold or low >= threshold

    # The interval holds every t with (rate - t)^2 <= z^2 t (1 - t) / size, so this solves for size.
    size = max(1, math.ceil(z * z * threshold * (1 - threshold) / gap))
    if size > 1 and clears(size - 1):
        return size - 1
    return size if clears(size) else size + 1


def _wilson_bounds(rate: float, n: int, z: float) -> tuple[float, float]:
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _tango_variance(x: int, y: int, n: int, delta: float) -> float:
    # n times the variance of (x - y) / n under "the difference is delta"; q is the restricted maximum
    # likelihood estimate of the probability behind y (Tango 1998, equation 9).
    linear = -x - y + (2 * n - x + y) * delta
    constant = -y * delta * (1 - delta)
    q = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    return max(0.0, 2 * q + delta * (1 - delta))


def _boundary(inside: Callable[[float], bool], start: float, end: float) -> float:
    # Bisection: `start` is inside, and the score is monotone, so there is one crossing on the way to `end`.
    if inside(end):
        return end
    for _ in range(60):
        middle = (start + end) / 2
        if inside(middle):
            start = middle
        else:
            end = middle
    return end


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _check_counts(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"expected counts with 0 <= part <= whole, got {successes} of {n}")
