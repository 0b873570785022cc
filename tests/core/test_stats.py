"""Intervals against scipy where it has them, brute force where it has not, and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, chi2

from robustbench_x.stats import Interval, bounded_mean, mcnemar_exact, paired_difference, samples_to_decide, wilson


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_wilson_equals_scipy(n: int, confidence: float) -> None:
    for successes in sorted({0, 1, n // 3, n - 1, n}):
        expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        found = wilson(successes, n, confidence)
        assert found.value == successes / n
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_touches_the_ends_exactly() -> None:
    assert wilson(0, 13).low == 0.0
    assert wilson(13, 13).high == 1.0


def test_nothing_measured_is_no_rate() -> None:
    assert wilson(0, 0) == Interval(value=None, low=None, high=None)
    assert paired_difference(0, 0, 0) == Interval()
    assert bounded_mean([]) == Interval()


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= part <= whole"):
        wilson(successes, n)
    with pytest.raises(ValueError, match="0 <= part <= whole"):
        samples_to_decide(successes, n, 0.5)


@pytest.mark.parametrize(("b", "c", "n"), [(3, 3, 5), (-1, 3, 5), (3, -1, 5)])
def test_more_disagreements_than_samples_are_refused(b: int, c: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= part <= whole"):
        paired_difference(b, c, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan, 95.0])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        wilson(1, 2, confidence)
    for values in ([], [0.5]):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            bounded_mean(values, confidence)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_mean_of_zeros_and_ones_is_a_rate(n: int, confidence: float) -> None:
    for successes in range(n + 1):
        values = [1.0] * successes + [0.0] * (n - successes)
        assert bounded_mean(values, confidence) == wilson(successes, n, confidence)


@pytest.mark.parametrize("n", [1, 3, 80])
def test_the_interval_of_a_mean_inverts_the_score_test(n: int) -> None:
    values = np.random.default_rng(n).beta(0.6, 1.5, n).tolist()
    found = bounded_mean(values)
    mean = float(np.mean(values))
    assert found.value == pytest.approx(mean, abs=1e-15)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < mean < found.high < 1
    for bound in (found.low, found.high):
        assert n * (mean - bound) ** 2 / (bound * (1 - bound)) == pytest.approx(chi2.ppf(0.95, 1), rel=1e-9)


# From the shape of a bell to that of a coin, where the interval has nothing to spare.
@pytest.mark.parametrize(("a", "b"), [(2, 2), (8, 1), (0.5, 0.5), (0.3, 2), (0.1, 0.1)])
@pytest.mark.parametrize("n", [10, 40])
def test_the_interval_of_a_mean_covers_the_truth(a: float, b: float, n: int) -> None:
    hits = 0
    for values in np.random.default_rng(0).beta(a, b, (1000, n)).tolist():
        found = bounded_mean(values)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= a / (a + b) <= found.high
    assert hits / 1000 >= 0.95


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf])
def test_a_value_outside_the_unit_interval_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"values must lie in \[0, 1\], got \["):
        bounded_mean([0.5, wrong])


def _tango_statistic(b: int, c: int, n: int, delta: float) -> float:
    """The squared score of "the difference is delta", its nuisance parameter found by searching the likelihood."""
    concordant = n - b - c

    def minus_log_likelihood(only_a: float) -> float:
        only_b = only_a + delta
        terms = ((b, only_a), (c, only_b), (concordant, 1 - only_a - only_b))
        if any(p < 0 or (k and p <= 0) for k, p in terms):
            return 1e9
        return -sum(k * math.log(p) for k, p in terms if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    best = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    candidates = [low, float(best.x), high]
    only_a = min(candidates, key=minus_log_likelihood)
    variance = n * (2 * only_a + delta - delta * delta)
    return (c - b - n * delta) ** 2 / variance


@pytest.mark.parametrize(("b", "c", "n"), [(2, 12, 50), (12, 2, 50), (0, 3, 20), (5, 5, 200), (30, 1, 31), (1, 0, 44)])
def test_paired_difference_inverts_the_score_test(b: int, c: int, n: int) -> None:
    found = paired_difference(b, c, n)
    assert found.value == (c - b) / n
    for bound in (found.low, found.high):
        assert bound is not None
        if abs(bound) < 1:
            assert _tango_statistic(b, c, n, bound) == pytest.approx(chi2.ppf(0.95, 1), rel=1e-4)


def test_paired_difference_is_antisymmetric_and_ordered() -> None:
    for n in (1, 4, 9):
        for b, c in itertools.product(range(n + 1), repeat=2):
            if b + c > n:
                continue
            ahead, back = paired_difference(b, c, n), paired_difference(c, b, n)
            assert ahead.low is not None
            assert ahead.high is not None
            assert back.low is not None
            assert back.high is not None
            assert (ahead.low, ahead.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
            assert -1 <= ahead.low <= (c - b) / n <= ahead.high <= 1
            assert ahead.low < ahead.high


def test_no_disagreement_still_has_a_width() -> None:
    z2 = chi2.ppf(0.95, 1)
    found = paired_difference(0, 0, 100)
    assert (found.low, found.high) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-9)


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(0.02, 0.02, 100), (0.05, 0.2, 60), (0.01, 0.0, 200), (0.3, 0.4, 40)]
)
def test_paired_difference_covers_the_truth(only_a: float, only_b: float, n: int) -> None:
    draws = np.random.default_rng(0).multinomial(n, [only_a, only_b, 1 - only_a - only_b], size=4000)
    cells, weight = np.unique(draws[:, :2], axis=0, return_counts=True)
    hits = 0
    for (b, c), times in zip(cells.tolist(), weight.tolist(), strict=True):
        found = paired_difference(b, c, n)
        assert found.low is not None
        assert found.high is not None
        hits += times if found.low <= only_b - only_a <= found.high else 0
    assert hits / 4000 >= 0.93


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 0), (5, 5), (3, 11), (40, 22), (500, 600)])
def test_mcnemar_equals_the_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        mcnemar_exact(-1, 2)


def _decides(rate: float, size: int, threshold: float) -> bool:
    """Wilson's interval as the set of rates its score test accepts: is `threshold` strictly inside it?"""
    return size * (rate - threshold) ** 2 >= float(chi2.ppf(0.95, 1)) * threshold * (1 - threshold)


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.5, 0.77, 0.99])
def test_samples_to_decide_is_the_first_size_that_decides(threshold: float) -> None:
    for successes, n in [(0, 10), (1, 9), (3, 8), (35, 100), (9, 11), (10, 10)]:
        found = samples_to_decide(successes, n, threshold)
        expected = next(size for size in itertools.count(1) if _decides(successes / n, size, threshold))
        assert found == expected


def test_samples_to_decide_agrees_with_wilson() -> None:
    size = samples_to_decide(2, 10, 0.3)
    assert size is not None
    enough = -(-size // 10) * 10
    after, before = wilson(enough // 5, enough), wilson((enough - 10) // 5, enough - 10)
    assert after.high is not None
    assert before.high is not None
    assert after.high <= 0.3 < before.high


def test_a_rate_on_the_threshold_is_never_decided() -> None:
    assert samples_to_decide(3, 10, 0.3) is None
    assert samples_to_decide(0, 10, 0.0) is None
    assert samples_to_decide(0, 0, 0.3) is None


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0, 2.0])
def test_a_threshold_that_no_interval_can_hold_is_decided_at_once(threshold: float) -> None:
    assert samples_to_decide(3, 10, threshold) == 1


def test_the_threshold_is_a_number() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        samples_to_decide(3, 10, math.nan)
