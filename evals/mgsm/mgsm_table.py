"""MGSM's results as a table: one line a language, one column a model or rule, with notes on partial results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.console import table
from evals.mgsm.numbers import HEADLINE
from evals.results import by_reason
from evals.statistics import Accuracy

UNSHIFTED = "\u2020"  # a dagger, as the star marks what is partial


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
        of_whom = f"{name}: " if len(results) > 1 else ""
        notes += [f"* {of_whom}{note}" for note in _notes(result, languages)]
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
    absent = {language: "not there" for language in languages if language not in result["languages"]}
    missing = absent | result["missing"]
    return [by_reason(some)] * bool(some) + [f"means lack languages: {by_reason(missing)}"] * bool(missing)
