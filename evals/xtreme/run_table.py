"""A run's scores beside the published row, and the gap between the dominant language and the others.

The transfer gap is the dominant language's score minus the mean of the others' (docs/methods.md, section 5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipeline.console import table
from data_pipeline.xtreme.tasks import XtremeTask
from evals.errors import EvalError
from evals.xtreme.score import TaskScores

SCORES_FILE = "scores.json"
Metrics = dict[str, float]
Cell = float | tuple[float, float] | None
_HEADS = {"exact_match": "EM", "token_accuracy": "token acc.", "f1_seqeval_1_2": "f1 (seqeval 1.2)"}

# Source: Yang et al. 2022 (arXiv 2205.04182), table 1, which also quotes FILTER's and xTune's rows. Means over a task's
# languages, English included; question answering is (F1, EM).
TASK_ORDER = ("xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa")

PUBLISHED: Mapping[str, Mapping[str, tuple[Cell, ...]]] = {
    "xlm-r-large": {
        "zero-shot": (79.2, 86.4, 73.8, 65.4, (76.6, 60.8), (71.6, 53.2), (65.1, 45.0)),
        "translate-train": (82.9, 90.1, 74.6, 66.8, (80.4, 65.6), (72.4, 54.7), (66.2, 48.2)),
        "x-mixup": (85.3, 91.8, 78.4, 69.0, (82.6, 69.3), (76.5, 58.1), (69.0, 52.8)),
        "filter": (83.9, 91.4, 76.2, 67.7, (82.4, 68.0), (76.2, 57.7), (68.3, 50.9)),
        "xtune": (84.8, 91.6, 79.3, 69.9, (82.5, 69.0), (75.0, 57.1), (75.4, 60.8)),
    },
    "mbert": {
        "zero-shot": (65.4, 81.9, 71.5, 62.2, (64.5, 49.4), (61.4, 44.2), (59.7, 43.9)),
        "translate-train": (75.1, 88.9, None, None, (72.4, 58.3), (67.6, 49.8), (59.5, 45.8)),
        "x-mixup": (78.8, 89.7, 76.5, 65.0, (73.3, 58.9), (69.0, 50.9), (60.8, 46.5)),
    },
}


def published_score(model: str, method: str, task: str) -> dict[str, float] | None:
    """Metric -> mean over languages, 0 to 100, under the scorer's names; None if nothing was published."""
    row = PUBLISHED.get(model, {}).get(method)
    cell = row[TASK_ORDER.index(task)] if row is not None and task in TASK_ORDER else None
    if cell is None:
        return None
    if isinstance(cell, tuple):
        return {"f1": cell[0], "exact_match": cell[1]}
    return {"f1" if task in ("udpos", "panx") else "accuracy": cell}


def transfer_gap(languages: Mapping[str, Mapping[str, float]], dominant: str, metrics: Sequence[str]) -> Metrics | None:
    """For each metric the dominant language's minus the others' mean, in points; None without either."""
    others = [scores for language, scores in languages.items() if language != dominant]
    if dominant not in languages or not others:
        return None
    return {metric: languages[dominant][metric] - fmean(scores[metric] for scores in others) for metric in metrics}


def gap_reduction(gap: Metrics, before: Mapping[str, float]) -> dict[str, float | None]:
    """The reduction of each gap in per cent of the earlier one; None if there was no positive gap."""
    return {
        metric: 100 * (before[metric] - value) / before[metric] if before[metric] > 0 else None
        for metric, value in gap.items()
    }


def summary(
    task: XtremeTask, scores: TaskScores, dominant: str, model: str, method: str, baseline: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All results of a run, as plain data. `baseline`: what `read_scores` returned for another run."""
    published = published_score(model, method, task.name)
    gap = transfer_gap(scores.languages, dominant, task.metrics)
    before = baseline["gap"] if baseline is not None else None
    return {
        "languages": scores.languages,
        "average": scores.average,
        "score": scores.score,
        "missing": scores.missing,
        "partial": scores.partial,
        "published": published,
        "difference": published and {metric: scores.average[metric] - value for metric, value in published.items()},
        "gap": gap,
        "baseline": baseline
        and {
            **{key: baseline[key] for key in ("output", "model", "method", "gap", "partial")},
            "reduction": gap_reduction(gap, before) if gap and before else None,
        },
    }


def read_scores(output: Path, task: XtremeTask) -> dict[str, Any]:
    """Another run's scores, for comparison. Raises EvalError: no such scores, or of another task."""
    file = output / SCORES_FILE
    try:
        content = json.loads(file.read_bytes())
        found = {key: content[key] for key in ("task", "model", "method")}
        found |= {"gap": content["summary"]["gap"], "partial": bool(content["summary"].get("missing"))}
    except OSError as error:
        raise EvalError(f"{file}: {error.strerror}; --baseline is the output folder of a finished run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{file}: not the scores of a finished run with labels") from error
    if found["task"] != task.name:
        raise EvalError(f"{file}: is of task {found['task']!r}, not {task.name!r}")
    return {"output": str(output), **found}


def run_table(task: XtremeTask, results: Mapping[str, Any], dominant: str) -> str:
    """One line a language, one column a metric; then the mean, the published row and the gap."""
    metrics = list(dict.fromkeys([*task.metrics, *results["average"]]))
    rows = [_row(language, metrics, scores) for language, scores in results["languages"].items()]
    star = "*" * results["partial"]
    rows.append(_row("mean" + star, metrics, results["average"]))
    if results["published"]:
        rows.append(_row("published", metrics, results["published"]))
        rows.append(_row("difference" + star, metrics, results["difference"], signed=True))
    if results["gap"]:
        rows.append(_row("gap" + star, metrics, results["gap"], signed=True))
    before = results["baseline"]
    if before and before["gap"]:
        rows.append(_row("baseline's gap" + "*" * before["partial"], metrics, before["gap"], signed=True))
    if before and before["reduction"]:
        cut = before["reduction"]
        rows.append(
            [
                "gap cut by" + "*" * (results["partial"] or before["partial"]),
                *(f"{cut[metric]:.1f} %" if cut.get(metric) is not None else "-" for metric in metrics),
            ]
        )
    lines = [table(["language", *(_HEADS.get(metric, metric) for metric in metrics)], rows)]
    if results["partial"]:
        lines.append(
            f"* without {', '.join(results['missing'])}: the published mean is over all of the task's languages"
        )
    if before and before["partial"] and before["gap"]:
        lines.append("* the baseline lacks languages of the task")
    if results["gap"]:
        lines.append(f"gap: {dominant} minus the mean of the others, in points")
    return "\n".join(lines)


def _row(name: str, metrics: Sequence[str], values: Mapping[str, float], signed: bool = False) -> list[str]:
    sign = "+" if signed else ""
    return [name, *(f"{values[metric]:{sign}.2f}" if metric in values else "-" for metric in metrics)]
