"""The quickstart's verdict claims only what its confidence interval supports."""

from __future__ import annotations

import pytest

from data_pipeline.toy_problems.corpus import LANGUAGES
from evals.quickstart import MODELS, OTHERS, table, verdict


def answers(english: float, others: float, items: int = 100) -> dict[str, list[bool]]:
    """The given shares right, spread differently over the items in each language."""
    share = {language: english if language == "en" else others for language in LANGUAGES}
    return {
        language: [(item * 37 + 11 * number) % items < share[language] * items for item in range(items)]
        for number, language in enumerate(LANGUAGES)
    }


def test_weak_base_english_allows_no_claim() -> None:
    result = verdict(answers(0.40, 0.10), answers(0.5, 0.2), answers(0.9, 0.9))
    assert result.text.startswith("No claim is possible: base English is 40%, below 50%.")
    assert result.low > 0


def test_no_dominance_gap_allows_no_claim() -> None:
    result = verdict(answers(0.80, 0.75), answers(0.8, 0.2), answers(0.9, 0.9))
    assert result.text.startswith("No claim is possible: base English is only 5 points above")


def test_a_gain_is_reported_if_the_interval_is_above_zero() -> None:
    result = verdict(answers(0.80, 0.20), answers(0.8, 0.4), answers(0.8, 0.7))
    assert result.text.startswith(
        "ShifCon gained: ShifCon minus MSFT continued over the 9 other languages: +30.0 points ["
    )
    assert (result.english, result.gap) == pytest.approx((0.80, 0.60))
    assert result.low < result.difference < result.high


def test_a_loss_is_reported_too() -> None:
    assert verdict(answers(0.8, 0.2), answers(0.8, 0.7), answers(0.8, 0.4)).text.startswith("ShifCon lost here")


def test_equal_scores_are_no_gain() -> None:
    equal = answers(0.8, 0.5)
    result = verdict(answers(0.8, 0.2), equal, equal)
    assert result.text.startswith("No gain shown")
    assert result.difference == 0


def test_english_is_left_out_of_the_comparison() -> None:
    same, better_english = answers(0.2, 0.5), answers(0.9, 0.5)
    assert verdict(answers(0.8, 0.2), same, better_english).difference == 0


def test_the_table_has_a_line_per_language_and_the_mean_with_intervals() -> None:
    lines = table({name: answers(0.8, 0.5) for name in MODELS}).splitlines()
    assert lines[0].split() == ["language", "base", "MSFT", "MSFT", "continued", "ShifCon"]
    assert [line.split()[0] for line in lines[2:-1]] == list(LANGUAGES)
    assert lines[-1].startswith("mean but en")
    assert all(line.count("[") == 4 for line in lines[2:])
    assert len(OTHERS) == 9
