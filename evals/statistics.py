"""Confidence intervals of scores. Formulas and sources: docs/methods.md, section 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.console import MARK


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy and its interval, as shares of 1; a mean over languages has no interval.

    `partial`: over some of the items or languages only; shown with a star.
    """

    value: float
    low: float | None = None
    high: float | None = None
    partial: bool = False

    def __str__(self) -> str:
        text = f"{100 * self.value:.1f} %{MARK * self.partial}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of `correct` out of `n`, as shares of 1. ValueError unless 0 <= correct <= n > 0."""
    from scipy.stats import binomtest

    if n < 1:
        raise ValueError("an interval needs at least one item")
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_mean(values_by_item: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over items of each item's mean, with Student's t interval over items: (mean, low, high).

    For scores over several languages that share their items: the languages' answers to one item are not
    independent, so the interval is over items. ValueError with fewer than two items.
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
