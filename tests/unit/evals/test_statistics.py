"""Intervals equal published examples and values computed by hand; how an accuracy is shown."""

from __future__ import annotations

import math

import pytest

from evals.statistics import Accuracy, clustered_mean, wilson_interval


def test_an_accuracy_is_shown_with_its_interval_and_marked_where_partial() -> None:
    assert str(Accuracy(0.5, 0.43849, 0.5615)) == "50.0 % [43.8, 56.1]"
    assert str(Accuracy(1.0, 0.985, 1.0, partial=True)) == "100.0 %* [98.5, 100.0]"
    assert str(Accuracy(0.262)) == "26.2 %"


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # the examples of Newcombe (1998), Statistics in Medicine 17:857
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_equal_published_ones(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_intervals_follow_the_formula_at_other_confidences() -> None:
    z = 2.5758293035489004  # the 99.5 % point of the normal distribution
    p, n = 100 / 250, 250
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert wilson_interval(100, 250, 0.99) == pytest.approx((middle - half, middle + half))


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"k \(|at least one item|must"):
        wilson_interval(correct, n)


def test_the_clustered_mean_has_students_interval_over_item_means() -> None:
    # Items with means 0, 1/2, 1: mean 1/2, standard error sqrt(1/4 / 3), t(0.975, 2) = 4.3027.
    mean, low, high = clustered_mean([[0, 0], [0, 1], [1, 1]])
    assert mean == pytest.approx(0.5)
    assert (high - mean, mean - low) == pytest.approx((4.302653 * math.sqrt(0.25 / 3),) * 2)


def test_repeating_items_in_more_languages_does_not_narrow_the_interval() -> None:
    once = clustered_mean([[0], [1], [1], [0], [1]])
    assert clustered_mean([[0] * 9, [1] * 9, [1] * 9, [0] * 9, [1] * 9]) == pytest.approx(once)


def test_one_item_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two"):
        clustered_mean([[1, 0]])
