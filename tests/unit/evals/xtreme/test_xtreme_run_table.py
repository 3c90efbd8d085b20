"""Transfer gap, its reduction, and the table of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.xtreme.tasks import TASKS
from evals.errors import EvalError
from evals.xtreme.run_table import gap_reduction, read_scores, run_table, summary, transfer_gap
from evals.xtreme.score import TaskScores

LANGUAGES = {"en": {"exact_match": 70.0, "f1": 80.0}, "de": {"exact_match": 50.0, "f1": 70.0},
             "sw": {"exact_match": 40.0, "f1": 56.0}}  # fmt: skip
METRICS = ("exact_match", "f1")


def test_the_gap_is_the_dominant_language_minus_the_mean_of_the_others() -> None:
    assert transfer_gap(LANGUAGES, "en", METRICS) == {"exact_match": 25.0, "f1": 17.0}
    assert transfer_gap(LANGUAGES, "sw", METRICS) == {"exact_match": -20.0, "f1": -19.0}
    assert transfer_gap(LANGUAGES, "fr", METRICS) is None
    assert transfer_gap({"en": LANGUAGES["en"]}, "en", METRICS) is None


def test_the_reduction_is_relative_to_a_positive_gap() -> None:
    assert gap_reduction({"f1": 6.0, "exact_match": 12.0}, {"f1": 10.0, "exact_match": 10.0}) == {
        "f1": pytest.approx(40.0), "exact_match": pytest.approx(-20.0),
    }  # fmt: skip
    assert gap_reduction({"f1": 6.0}, {"f1": 0.0}) == {"f1": None}
    assert gap_reduction({"f1": 6.0}, {"f1": -1.0}) == {"f1": None}


def test_the_table_has_languages_mean_published_row_and_gap() -> None:
    scores = TaskScores(LANGUAGES, {"exact_match": 160 / 3, "f1": 206 / 3}, 61.0, {"ar": "no predictions"})
    baseline = {"output": "o", "model": "m", "method": "zero-shot", "gap": {"exact_match": 50.0, "f1": 0.0},
                "partial": False}  # fmt: skip
    result = summary(TASKS["tydiqa"], scores, "en", "xlm-r-large", "x-mixup", baseline)
    assert run_table(TASKS["tydiqa"], result, "en").splitlines() == [
        "language            EM      f1",
        "--------------  ------  ------",
        "en               70.00   80.00",
        "de               50.00   70.00",
        "sw               40.00   56.00",
        "mean*            53.33   68.67",
        "published        52.80   69.00",
        "difference*      +0.53   -0.33",
        "gap*            +25.00  +17.00",
        "baseline's gap  +50.00   +0.00",
        "gap cut by*     50.0 %       -",
        "* without ar: the published mean is over all of the task's languages",
        "gap: en minus the mean of the others, in points",
    ]
    bare = summary(TASKS["tydiqa"], scores, "fr", "xlm-r-large", "no-mixup", None)
    assert (bare["published"], bare["difference"], bare["gap"], bare["baseline"]) == (None,) * 4
    assert len(run_table(TASKS["tydiqa"], bare, "fr").splitlines()) == 7


def test_scores_of_another_run_are_read_or_refused(tmp_path: Path) -> None:
    task = TASKS["tydiqa"]
    with pytest.raises(EvalError, match=r"scores\.json: No such file or directory; --baseline is the output folder"):
        read_scores(tmp_path, task)
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"task": "tydiqa", "model": "m", "method": "z", "summary": None}), encoding="utf-8")
    with pytest.raises(EvalError, match="not the scores of a finished run with labels"):
        read_scores(tmp_path, task)
    content = {"task": "tydiqa", "model": "m", "method": "z", "summary": {"gap": {"f1": 1.0}}}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert read_scores(tmp_path, task) == {
        "output": str(tmp_path), "task": "tydiqa", "model": "m", "method": "z", "gap": {"f1": 1.0},
        "partial": False,
    }  # fmt: skip
    file.write_text(json.dumps({**content, "summary": {"gap": {"f1": 1.0}, "missing": {"ar": "no labels"}}}))
    assert read_scores(tmp_path, task)["partial"] is True


def test_a_gap_against_a_partial_baseline_is_marked() -> None:
    whole = TaskScores(LANGUAGES, {"exact_match": 160 / 3, "f1": 206 / 3}, 61.0, {})
    baseline = {"output": "o", "model": "m", "method": "z", "partial": True, "gap": {"exact_match": 50.0, "f1": 34.0}}
    result = summary(TASKS["tydiqa"], whole, "en", "own", "x-mixup", baseline)
    assert result["partial"] is False
    lines = run_table(TASKS["tydiqa"], result, "en").splitlines()
    assert [line.split("  ")[0] for line in lines if "*" in line] == [
        "baseline's gap*", "gap cut by*", "* the baseline lacks languages of the task"
    ]  # fmt: skip
