"""Reads and checks the columns of each kind of task: rows -> Examples.

A row gives an Example and, if it has the columns, the Example of its back-translation. `read_example` checks that
text and labels are consistent. `check_example`, used in training only, checks that labels exist and are among
`task.labels`: prediction needs no labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from data_pipeline.config import TASK_COLUMNS, ColumnMap, TaskKind
from data_pipeline.records import BadRow, Example, Record, item_key
from data_pipeline.sources.cells import Cells
from data_pipeline.sources.formats import JsonLines
from data_pipeline.tasks.config import TaskConfig

SUM_TOLERANCE = 1e-3  # of a word's probabilities, which files hold with few digits
Sides = tuple[Example, Example | None]


def read_example(cells: Cells, columns: ColumnMap) -> Sides:
    """The row's Example, and the Example of its back-translation or None. Raises BadRow."""
    kind = columns.kind
    if kind == "classification":
        return _classification(cells, columns)
    if kind == "tagging":
        return _tagging(cells, columns)
    if kind == "qa":
        return _qa(cells, columns)
    return Example((cells.text(cast(str, columns.text)),)), None


def read_task_file(path: Path, kind: TaskKind) -> Iterator[Record]:
    """Reads a JSONL file for prediction, with the canonical column names of its kind.

    `id`, `language` and the texts are required; `group`, labels and back-translations are optional. A sentence to be
    tagged may have no words; it is kept. Raises BadRow at the first row that cannot be used.
    """
    shard = JsonLines(str(path), path.name, "")
    columns: ColumnMap | None = None
    with path.open("rb") as file:
        for place, row in shard.rows(file):
            if isinstance(row, BadRow):
                raise row
            cells = Cells(row, shard.origin(place))
            if columns is None:
                columns = _canonical(kind, pairs=cells.has("text_b"))
            if kind == "classification" and columns.text_b is None and cells.has("text_b"):
                raise cells.bad(
                    "'text_b' is given, but not in the rows before: texts come in pairs in all rows or none"
                )
            name, language = str(cells.name("id")), cells.text("language")
            group = str(cells.name("group")) if cells.has("group") else name
            empty = kind == "tagging" and row.get("words") == []
            sides = (Example((), tags=()), None) if empty else read_example(cells, columns)
            yield Record(name, item_key(group), language, cells.origin, *sides)


def _canonical(kind: TaskKind, pairs: bool) -> ColumnMap:
    needed, others = TASK_COLUMNS[kind]
    names = [what for what in (*needed, *others) if pairs or not what.endswith("text_b")]
    return ColumnMap(**{name: name for name in names})


def check_example(example: Example, task: TaskConfig, origin: str) -> None:
    """Raises BadRow if an Example lacks labels that training on the task needs."""

    def known(label: str, what: str) -> None:
        if label not in task.labels:
            raise BadRow(origin, f"{what} {label!r} is not declared; task.labels are {', '.join(task.labels)}")

    if task.kind == "classification":
        if example.label is None:
            raise BadRow(origin, "no label, which training needs")
        known(example.label, "label")
    elif task.kind == "tagging":
        if example.tags is None and example.soft_tags is None:
            raise BadRow(origin, "neither tags nor soft_tags, one of which training needs")
        for tag in example.tags or ():
            known(tag, "tag")
        if example.soft_tags is not None and len(example.soft_tags[0]) != len(task.labels):
            raise BadRow(
                origin, f"soft_tags have {len(example.soft_tags[0])} numbers a word; task.labels are {len(task.labels)}"
            )
    elif task.kind == "qa" and example.answers is None:
        raise BadRow(origin, "no answers, which training needs")


def _classification(cells: Cells, columns: ColumnMap) -> Sides:
    label = cells.name(columns.label) if cells.has(columns.label) else None
    example = Example(_pair(cells, columns.text_a, columns.text_b), label=label)
    if not cells.has(columns.back_text_a) and not cells.has(columns.back_text_b):
        return example, None
    return example, Example(_pair(cells, columns.back_text_a, columns.back_text_b), label=label)


def _pair(cells: Cells, first: str | None, second: str | None) -> tuple[str, ...]:
    text = cells.text(cast(str, first))  # checked by ColumnMap
    return (text,) if second is None else (text, cells.text(second))


def _tagging(cells: Cells, columns: ColumnMap) -> Sides:
    words = _words(cells, cast(str, columns.words))
    tags = soft_tags = back = None
    if columns.tags is not None and cells.has(columns.tags):
        found = _list(cells, columns.tags, len(words))
        tags = tuple(_tag(cells, tag, f"{columns.tags!r}[{number}]") for number, tag in enumerate(found))
    if columns.soft_tags is not None and cells.has(columns.soft_tags):
        soft_tags = _soft_tags(cells, columns.soft_tags, len(words))
    if columns.back_words is not None and cells.has(columns.back_words):
        back = Example(_words(cells, columns.back_words))
    return Example(words, tags=tags, soft_tags=soft_tags), back


def _list(cells: Cells, column: str, n_words: int | None = None) -> list[Any]:
    found = cells.listed(column)
    if not isinstance(found, list):
        raise cells.bad(f"{column!r} is {type(found).__name__}; it must be a list")
    if n_words is not None and len(found) != n_words:
        raise cells.bad(f"{column!r} has {len(found)} entries; there are {n_words} words")
    return found


def _words(cells: Cells, column: str) -> tuple[str, ...]:
    words = _list(cells, column)
    if not words:
        raise cells.bad(f"{column!r} is empty")
    for number, word in enumerate(words):
        # words of white space only occur in real sentences, with a tag
        if cells.unicode(word, f"{column!r}[{number}]") == "":
            raise cells.bad(f"{column!r}[{number}] is empty")
    return tuple(words)


def _tag(cells: Cells, tag: Any, what: str) -> str:
    return str(tag) if type(tag) is int else cells.checked(tag, what)


def _soft_tags(cells: Cells, column: str, n_words: int) -> tuple[tuple[float, ...], ...]:
    found = _list(cells, column, n_words)
    width = len(found[0]) if isinstance(found[0], list) else 0
    for number, row in enumerate(found):
        what = f"{column!r}[{number}]"
        if not isinstance(row, list) or not all(type(value) in (int, float) for value in row):
            raise cells.bad(f"{what} is not a list of numbers, one a label")
        if len(row) != width:
            raise cells.bad(f"{what} has {len(row)} numbers, the words before it {width}")
        if not all(0 <= value <= 1 + SUM_TOLERANCE for value in row):
            raise cells.bad(f"{what} must be probabilities, between 0 and 1")
        if not math.isclose(sum(row), 1, rel_tol=0, abs_tol=SUM_TOLERANCE):
            raise cells.bad(f"{what} must sum to 1; the sum is {sum(row):g}")
    return tuple(tuple(map(float, row)) for row in found)


def _qa(cells: Cells, columns: ColumnMap) -> Sides:
    def side(question: str | None, context: str | None, answers: str | None) -> Example:
        texts = (cells.text(cast(str, question)), cells.text(cast(str, context)))
        return Example(texts, answers=_answers(cells, answers, texts[1]) if answers is not None else None)

    example = side(columns.question, columns.context, columns.answers)
    if not cells.has(columns.back_question) and not cells.has(columns.back_context):
        return example, None
    return example, side(columns.back_question, columns.back_context, columns.back_answers)


def _answers(cells: Cells, column: str, context: str) -> tuple[tuple[str, int], ...] | None:
    if not cells.has(column):
        return None
    found = cells.listed(column)
    if isinstance(found, dict) and set(found) == {"text", "answer_start"}:  # the format of data sets on the hub
        texts, starts = found["text"], found["answer_start"]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise cells.bad(f"{column!r} must have as many starts as texts")
        found = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(found, list) or not all(isinstance(answer, dict) for answer in found):
        raise cells.bad(f"{column!r} must be a list of {{text, answer_start}}")
    answers = []
    for number, answer in enumerate(found):
        what = f"{column!r}[{number}]"
        text, start = cells.checked(answer.get("text"), f"{what}.text"), answer.get("answer_start")
        if type(start) is not int or start < 0:
            raise cells.bad(f"{what}.answer_start is {start!r}; it must be a number of characters")
        if context[start : start + len(text)] != text:
            place = context.find(text)
            where = f"it is at {place}" if place >= 0 else "the context does not contain it"
            raise cells.bad(f"{what} {_short(text)} is not at character {start} of the context; {where}")
        answers.append((text, start))
    return tuple(answers) or None


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}...")
