"""Which rank counts as a straggler; `test_preflight.py` measures real ranks."""

from __future__ import annotations

import pytest

from training.loop.straggler import compare


def test_the_slowest_rank_is_compared_with_the_median() -> None:
    metrics, warnings = compare([(1.0, 0.1, "a"), (1.1, 0.4, "a"), (1.8, 0.2, "b"), (0.9, 0.0, "b")])
    assert metrics == {
        "ranks/slowest": 2.0, "ranks/slowdown": pytest.approx(1.8), "ranks/data_wait_seconds_max": 0.4,
        "ranks/data_wait_seconds_median": 0.1,
    }  # fmt: skip
    assert warnings == ["rank 2 on b computes 1.8 times as slowly as the median rank; all wait for it"]


def test_of_two_ranks_the_slow_one_is_compared_with_the_other() -> None:
    metrics, warnings = compare([(2.0, 0.0, "a"), (1.0, 0.0, "b")])
    assert metrics["ranks/slowdown"] == 2.0
    assert len(warnings) == 1


def test_usual_differences_give_no_warning() -> None:
    metrics, warnings = compare([(1.0, 0.0, "a"), (1.49, 0.0, "b")])
    assert metrics["ranks/slowest"] == 1.0
    assert warnings == []
