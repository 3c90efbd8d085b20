"""A teacher's soft tags: canonical rows of translated sentences with `soft_tags`, probabilities for each word.

In: canonical rows of the task with words, and the probabilities that a model trained on English gives them. Out: a file
of rows that training reads, and its rows, checked. Next: `data.sources` of a run file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import Row
from data_pipeline.xtreme.lines import text_lines
from data_pipeline.xtreme.tasks import XtremeTask

TOLERANCE = 1e-3  # how far from one the probabilities of a word may sum
DIGITS = 6


def soft_row(row: Row, probabilities: Sequence[Sequence[float]], task: XtremeTask) -> Row:
    """The row with `soft_tags` in place of `tags`. `probabilities` (words, labels): in the order of the task's labels.

    Raises DataError: not one vector a word or one value a label, or values that are no probabilities.
    """
    checked = {name: value for name, value in row.items() if name != "tags"}
    checked["soft_tags"] = [[round(float(value), DIGITS) for value in values] for values in probabilities]
    _check(checked, task, f"row {row.get('id')!r}")
    return checked


def write_soft_rows(file: Path, rows: Iterable[Row]) -> int:
    """Write rows with `soft_tags`, all or none; returns how many. Raises DataError: the disk."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    n_rows = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8", newline="\n") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                n_rows += 1
        partial.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)  # gone after the renaming
    return n_rows


def read_soft_rows(file: Path, task: XtremeTask) -> Iterator[Row]:
    """The rows of a teacher's file. Raises DataError naming file and line: no JSON, or soft tags that do not fit."""
    for number, text in text_lines(file):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file}:{number}: not JSON; each line is one row") from error
        _check(row, task, f"{file}:{number}")
        yield row


def _check(row: Row, task: XtremeTask, place: str) -> None:
    words, soft = row.get("words"), row.get("soft_tags")
    if not words or soft is None:
        raise DataError(f"{place}: no words or no soft_tags; a teacher's row has both")
    if len(words) != len(soft):
        raise DataError(f"{place}: {len(words)} words, but soft_tags for {len(soft)}")
    for word, values in zip(words, soft, strict=True):
        if len(values) != len(task.labels):
            raise DataError(
                f"{place}: {len(values)} values for {word!r}, but {task.name} has {len(task.labels)} labels"
            )
        if min(values) < 0 or not abs(sum(values) - 1) <= TOLERANCE:
            raise DataError(f"{place}: soft_tags of {word!r} sum to {sum(values):.4g}; they must be probabilities")
