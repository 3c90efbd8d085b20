"""Intervals and paired tests equal published examples and values computed by hand."""

from __future__ import annotations

import math

import pytest

from evals.statistics import clustered_mean, paired_difference, wilson_interval


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    correct_a = [True] * (both + only_a) + [False] * (only_b + neither)
    correct_b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return correct_a, correct_b


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


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # method 10 in Newcombe (1998), Statistics in Medicine 17:2635; here b and c change places
        ((36, 2, 12, 0), 0.0569, 0.3404),
        ((20, 2, 12, 16), 0.0562, 0.3292),
        ((54, 0, 0, 0), -0.0664, 0.0664),
    ],
)
def test_paired_intervals_equal_published_ones(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    found = paired_difference(*table(*counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_a_paired_difference_is_b_minus_a() -> None:
    found = paired_difference(*table(20, 2, 12, 16))
    assert (found.n, found.both, found.only_a, found.only_b, found.neither) == (50, 20, 2, 12, 16)
    assert found.difference == pytest.approx(0.2)
    turned = paired_difference(*reversed(table(20, 2, 12, 16)))
    assert (turned.difference, turned.low, turned.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert turned.p_value == pytest.approx(found.p_value)


def test_the_mcnemar_test_is_exact() -> None:
    # 2 * (C(14,0) + C(14,1) + C(14,2)) / 2**14, by hand
    assert paired_difference(*table(20, 2, 12, 16)).p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert paired_difference(*table(0, 0, 5, 100)).p_value == pytest.approx(2 / 2**5)
    assert paired_difference(*table(30, 4, 4, 2)).p_value == 1.0
    assert paired_difference(*table(30, 0, 0, 20)).p_value == 1.0


def test_a_paired_difference_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="at least one item"):
        paired_difference([], [])


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
