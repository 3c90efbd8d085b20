"""Scores as a text table for terminals.

In: accuracies with intervals, by language and model. Out: aligned lines. Next: the command line prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy and its interval, as shares of 1; an average over languages has no interval.

    `partial`: of some of the items, or of the languages, only; marked with a star.
    """

    value: float
    low: float | None = None
    high: float | None = None
    partial: bool = False

    def __str__(self) -> str:
        text = f"{100 * self.value:.1f} %{'*' * self.partial}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def by_reason(reasons: Mapping[str, str]) -> str:
    """ "no predictions: de, fr; no labels: sw"."""
    languages: dict[str, list[str]] = {}
    for language, reason in reasons.items():
        languages.setdefault(reason, []).append(language)
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in languages.items())


def accuracy_table(
    rows: Sequence[tuple[str, Sequence[Accuracy | None]]], columns: Sequence[str], notes: Sequence[str] = ()
) -> str:
    """One line a row (a language), one column a model; None, where a model has no score, is "-".

    ValueError if a row has another number of cells than there are columns.
    """
    for name, cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"row {name!r} has {len(cells)} cells for {len(columns)} columns")
    lines = [["language", *columns]]
    lines += [[name, *("-" if cell is None else str(cell) for cell in cells)] for name, cells in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*table, *notes])
