"""Metrics, a table and a plot of an evaluation for the MLflow page of its run.

The metrics and files of `mgsm.evaluate_mgsm`'s results are passed to a `TrackScores` callable, which sends them to the
run that exported the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.plot_text import PlotText
from evals.errors import EvalError
from evals.mgsm.mgsm_table import mgsm_table
from evals.results import RESULTS_FILE

TABLE_FILE, PLOT_FILE = "table.txt", "accuracy.png"

# (the model's folder, name of the test, metrics, files) -> a line about where they went; None: nowhere, as the model is
# of no run. `training.tracking.scores.track_scores` is one.
TrackScores = Callable[[Path, str, Mapping[str, float], Sequence[Path]], str | None]


def score_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy (by the headline rule, as a share of 1) and number of problems by language, and the means."""
    rule = results["headline"]
    metrics = {}
    for language, score in results["languages"].items():
        metrics[f"accuracy/{language}"] = score["accuracy"][rule]["value"]
        metrics[f"n/{language}"] = float(score["n"])
    return metrics | {f"accuracy/mean_{name}": by_rule[rule] for name, by_rule in results["averages"].items()}


def write_score_files(results: Mapping[str, Any], output: Path, name: str) -> list[Path]:
    """Write table and plot beside an evaluation's results.json; returns all three. Raises EvalError."""
    table, plot = output / TABLE_FILE, output / PLOT_FILE
    counts = ", ".join(f"{language} {_count(score)}" for language, score in results["languages"].items())
    write_text(table, f"{mgsm_table({name: results})}\n\nproblems: {counts}\n")
    try:
        _draw(results, plot, name)
    except OSError as error:
        raise EvalError(f"{plot}: cannot be written: {error.strerror}") from error
    return [output / RESULTS_FILE, table, plot]


def _count(score: Mapping[str, Any]) -> str:
    """The number of problems, and of how many if not all were used."""
    return f"{score['n']} of {score['available']}" if score["partial"] else str(score["n"])


def _draw(results: Mapping[str, Any], plot: Path, name: str) -> None:
    """Plot accuracy with its 95 % interval, one bar a language."""
    from matplotlib.figure import Figure

    scores, rule = results["languages"], results["headline"]
    text = PlotText.of([name, *scores])
    with text.fonts():
        figure = Figure(figsize=(max(5.0, 1.5 + 0.6 * len(scores)), 4), layout="constrained")
        axes = figure.subplots()
        found = [score["accuracy"][rule] for score in scores.values()]
        values = [100 * each["value"] for each in found]
        below = [100 * max(each["value"] - each["low"], 0) for each in found]
        above = [100 * max(each["high"] - each["value"], 0) for each in found]
        axes.bar(range(len(scores)), values, color="#56B4E9")
        axes.errorbar(range(len(scores)), values, [below, above], fmt="none", ecolor="0.3", capsize=3, linewidth=1)
        labels = [f"{text(language)}\nn={_count(score)}" for language, score in scores.items()]
        axes.set_xticks(range(len(scores)), labels, fontsize="small")
        axes.set(title=f"{text(name)}: accuracy, 95 % interval", ylabel="%", ylim=(0, 100))
        axes.grid(alpha=0.3, axis="y")
        figure.savefig(plot, dpi=120)
