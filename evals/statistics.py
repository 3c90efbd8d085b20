"""How sure a score is, and whether two scores on the same items differ.

In: counts of right answers, or right/wrong per item of two systems. Out: intervals and p-values.
Formulas and sources: docs/methods.md, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B minus A over the same `n` items, as shares of 1. `p_value`: exact McNemar, two-sided."""

    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    high: float
    p_value: float


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of `correct` out of `n`, as shares of 1. ValueError unless 0 <= correct <= n > 0."""
    from scipy.stats import binomtest

    if n < 1:
        raise ValueError("an interval needs at least one item")
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(
    correct_a: Sequence[bool], correct_b: Sequence[bool], confidence: float = 0.95
) -> PairedDifference:
    """Compares two systems item by item.

    The interval is Newcombe's (1998, method 10): two Wilson intervals joined with the items' correlation; it
    stays within [-1, 1] and holds its coverage at small n and near 0 and 1. The test sees only items on which
    the systems disagree. ValueError if the two are of different length or empty.
    """
    from scipy.stats import binomtest

    pairs = list(zip(correct_a, correct_b, strict=True))
    n = len(pairs)
    both, only_a = pairs.count((True, True)), pairs.count((True, False))
    only_b, neither = pairs.count((False, True)), pairs.count((False, False))
    low_a, high_a = wilson_interval(both + only_a, n, confidence)
    low_b, high_b = wilson_interval(both + only_b, n, confidence)
    share_a, share_b = (both + only_a) / n, (both + only_b) / n
    phi = _correlation(both, only_a, only_b, neither)
    difference = share_b - share_a
    down = _joined(share_b - low_b, high_a - share_a, phi)
    up = _joined(high_b - share_b, share_a - low_a, phi)
    p_value = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedDifference(n, both, only_a, only_b, neither, difference, difference - down, difference + up, p_value)


def clustered_mean(values_by_item: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over items of each item's mean, with Student's t interval over items: (mean, low, high).

    For scores over several languages that share their items: the languages' answers to one item are not
    independent, so the item is what counts. ValueError with fewer than two items.
    """
    from scipy.stats import t

    means = [math.fsum(values) / len(values) for values in values_by_item]
    n = len(means)
    if n < 2:
        raise ValueError("an interval over items needs at least two items")
    mean = math.fsum(means) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in means) / (n - 1) / n)
    reach = float(t.ppf((1 + confidence) / 2, n - 1)) * spread
    return mean, mean - reach, mean + reach


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi, with his continuity correction of a positive association; 0 where a margin is empty."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    association: float = both * neither - only_a * only_b
    if association > 0:
        association = max(0.0, association - (both + only_a + only_b + neither) / 2)
    return association / math.sqrt(margins) if margins else 0.0
