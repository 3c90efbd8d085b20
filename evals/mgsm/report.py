"""MGSM's results as a table, a plot and metrics, logged to the MLflow run that trained the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic import atomic_file, write_text
from data_pipeline.console import table
from data_pipeline.plot_text import PlotText
from evals.mgsm.numbers import HEADLINE
from evals.results import by_reason
from evals.statistics import Accuracy
from training.tracking.run_record import RESULTS_FILE, TABLE_FILE

PLOT_FILE = "accuracy.png"
UNSHIFTED = "\u2020"  # a dagger; the star marks partial results


def mgsm_table(results: Mapping[str, Mapping[str, Any]], rules: Sequence[str] = (HEADLINE,)) -> str:
    """Results by name, as `evaluate_mgsm` returns them, side by side: one line a language, then the averages.

    A star marks every number that covers only some problems or languages; notes below state which.
    """
    columns = [(name, rule) for name in results for rule in rules]
    plain = len(rules) == 1, len(results) == 1
    headers = [name if plain[0] else rule if plain[1] else f"{name} {rule}" for name, rule in columns]
    rows: list[tuple[str, list[Accuracy | None]]] = []
    notes = []
    languages = list(dict.fromkeys(language for result in results.values() for language in result["languages"]))
    for language in languages:
        scores = {name: result["languages"].get(language) for name, result in results.items()}
        unshifted = any(
            score is not None and score["shifted"] is False and _shifts(results[name]) for name, score in scores.items()
        )
        if unshifted:
            notes = [f"{UNSHIFTED} no language vector: ran unshifted"]
        rows.append((language + UNSHIFTED * unshifted, [_cell(scores[name], rule) for name, rule in columns]))
    for average in dict.fromkeys(key for result in results.values() for key in result["averages"]):
        rows.append(
            (f"mean {average.replace('_', ' ')}", [_mean(results[n], average, r, languages) for n, r in columns])
        )
    for name, result in results.items():
        prefix = f"{name}: " if len(results) > 1 else ""
        notes += [f"* {prefix}{note}" for note in _notes(result, languages)]
    header = ["language", *headers]
    return table(header, [(name, *cells) for name, cells in rows], text=range(len(header)), notes=notes)


def _shifts(result: Mapping[str, Any]) -> bool:
    return bool(result["run"]) and result["run"]["model"]["objective"] == "shifcon"


def _cell(score: Mapping[str, Any] | None, rule: str) -> Accuracy | None:
    if score is None:
        return None
    found = score["accuracy"][rule]
    return Accuracy(found["value"], found["low"], found["high"], score["partial"])


def _mean(result: Mapping[str, Any], average: str, rule: str, languages: Sequence[str]) -> Accuracy | None:
    """`languages`: those of all results in the table; a mean over fewer is not comparable."""
    if average not in result["averages"]:
        return None
    lacks = average != "published_ten" and any(language not in result["languages"] for language in languages)
    return Accuracy(result["averages"][average][rule], partial=lacks or average in result["partial"])


def _notes(result: Mapping[str, Any], languages: Sequence[str]) -> list[str]:
    """What is partial in a result, as "2 of 250 problems: bn, de" and "means without: no predictions: fr"."""
    some = {
        language: f"{score['n']} of {score['available']} problems"
        for language, score in result["languages"].items()
        if score["partial"]
    }
    absent = {language: "not evaluated" for language in languages if language not in result["languages"]}
    missing = absent | result["missing"]
    return [by_reason(some)] * bool(some) + [f"means lack languages: {by_reason(missing)}"] * bool(missing)


def score_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy (by the headline rule, as a share of 1) and number of problems by language, and the means."""
    rule = results["headline"]
    metrics = {}
    for language, score in results["languages"].items():
        metrics[f"accuracy/{language}"] = score["accuracy"][rule]["value"]
        metrics[f"n/{language}"] = float(score["n"])
    return metrics | {f"accuracy/mean_{name}": by_rule[rule] for name, by_rule in results["averages"].items()}


def write_score_files(results: Mapping[str, Any], output: Path, name: str) -> list[Path]:
    """Write the table and the plot beside an evaluation's results.json. Returns all three files. Raises WriteError."""
    text, plot = output / TABLE_FILE, output / PLOT_FILE
    counts = ", ".join(f"{language} {_count(score)}" for language, score in results["languages"].items())
    write_text(text, f"{mgsm_table({name: results})}\n\nproblems: {counts}\n")
    with atomic_file(plot) as temporary:
        _draw(results, temporary, name)
    return [output / RESULTS_FILE, text, plot]


def track_results(results: Mapping[str, Any], output: Path, name: str) -> list[str]:
    """Add an evaluation's scores to the model's card, and to the MLflow run that trained it. Returns lines about it."""
    from training.checkpoints.card_sections import add_scores
    from training.tracking.scores import track_scores

    model, files = Path(results["run"]["model"]["path"]), write_score_files(results, output, name)
    table = (output / TABLE_FILE).read_text(encoding="utf-8")
    lines = track_scores(model, name, score_metrics(results), files), add_scores(model, name, results["run"], table)
    return [line for line in lines if line is not None]


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
        figure.savefig(plot, dpi=120, format="png")
