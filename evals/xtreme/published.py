"""Published results from X-Mixup's paper, for comparison with a run's own scores.

Source: Yang et al. 2022 (arXiv 2205.04182), table 1, which also quotes FILTER's and xTune's rows. Means over a task's
languages, English included; question answering is (F1, EM).
"""

from __future__ import annotations

from collections.abc import Mapping

TASK_ORDER = ("xnli", "pawsx", "udpos", "panx", "xquad", "mlqa", "tydiqa")
Cell = float | tuple[float, float] | None

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
