"""Readers of XTREME's text formats: tab-separated sentence pairs, tagged words, one sentence a line.

A DataError names file and line. Byte order marks, CR LF and trailing blank lines are accepted everywhere. A line is
never joined with the next: an unbalanced quote is text. XTREME's script writes pairs with a CSV writer, which quotes
fields and doubles their quotes; if a whole file is written in this way, the quoting is removed (xTune's authors advise
to switch it off, so both kinds of files exist).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import count, zip_longest
from pathlib import Path
from typing import NamedTuple

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import NO_WORD, Pair, Sentence, check_label
from data_pipeline.xtreme.tasks import XtremeTask

OTHER_NAMES = {"contradictory": "contradiction"}  # the label's name in XNLI's training files
DOCUMENT_START = "-DOCSTART-"  # followed by a blank line in CoNLL's files; not a sentence
SUM_TOLERANCE = 0.01  # tolerance for a teacher's printed probabilities
XnliLine = tuple[str, str, tuple[str, str, str]]  # place, language, (text, text, label)


class Columns(NamedTuple):
    """The columns of a file of pairs; column numbers from 0."""

    text_a: int
    text_b: int
    label: int | None
    counts: tuple[int, ...]  # allowed numbers of columns; without the label column, the labels are erased
    meaning: str  # for messages
    header: bool = False
    name: int | None = None
    original: tuple[int, int] | None = None
    lenient: bool = False  # a bad line becomes an empty pair, which the caller counts


TEXTS_LABEL = Columns(0, 1, 2, (2, 3), "text, text, label")
TEXTS_LABEL_HEADER = TEXTS_LABEL._replace(header=True)
PAWS = Columns(1, 2, 3, (3, 4), "id, text, text, label", header=True, name=0)
TRANSLATED = Columns(2, 3, 4, (4, 5), "original, original, text, text, label", original=(0, 1), lenient=True)


def text_lines(file: Path, whole: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line; trailing blank lines only of the `whole` file.

    Raises DataError: the file cannot be read, or a line is not UTF-8.
    """
    blank: list[int] = []
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    text = content.removesuffix(b"\n").removesuffix(b"\r").decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from error
                if not text.strip(" "):
                    blank.append(number)
                    continue
                yield from ((earlier, "") for earlier in blank)
                blank.clear()
                yield number, text
            if whole:
                yield from ((earlier, "") for earlier in blank)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def read_texts(file: Path, empty: bool = False, least: int = 0) -> list[str]:
    """One sentence a line. Raises DataError for an empty line inside the file, unless `empty` allows such lines.

    With `empty`, trailing empty lines count as far as they are needed to reach `least`.
    """
    found: list[str] = []
    for number, text in text_lines(file, whole=empty):
        if not text.strip() and not empty:
            raise DataError(f"{file}:{number}: empty; each line is one sentence")
        found.append(text.strip())
    while len(found) > least and not found[-1]:
        found.pop()
    return found


def read_pairs(file: Path, task: XtremeTask, columns: Columns) -> Iterator[Pair]:
    """Every line of a file of pairs unchanged, empty texts included. Raises DataError for the first bad line."""
    quoted = _written_as_csv(file)
    index = count()
    for number, line in text_lines(file):
        place = f"{file}:{number}"
        fields = [field.strip() for field in line.split("\t")]
        if quoted:
            fields = [field[1:-1].replace('""', '"').strip() if _quoted(field) else field for field in fields]
        label = _label(fields, columns, task)
        if number == 1 and columns.header and label not in task.labels:
            continue
        problem = None
        if len(fields) not in columns.counts:
            problem = f"{len(fields)} columns; there must be {columns.counts[-1]}: {columns.meaning}"
        elif label is not None and label not in task.labels:
            problem = f"label {label!r} is not one of {task.name}'s: {', '.join(task.labels)}"
        if problem is not None:
            if not columns.lenient:
                raise DataError(f"{place}: {problem}")
            yield Pair(place, next(index), "", "")
            continue
        yield Pair(
            place, next(index), fields[columns.text_a], fields[columns.text_b], label,
            name=None if columns.name is None else fields[columns.name],
            original=None if columns.original is None else (fields[columns.original[0]], fields[columns.original[1]]),
        )  # fmt: skip


def read_xnli(file: Path, task: XtremeTask, language: str, codes: Path | None = None) -> Iterator[Pair]:
    """The pairs of one language in XNLI's own `xnli.dev.tsv`, which holds all languages and has a header line.

    `codes`: the file whose languages count, line by line, if `file` is its translation.
    """
    index = count()
    lines = _xnli_lines(file, task)
    for place, code, pair in lines if codes is None else _same_lines(lines, _xnli_lines(codes, task), file, codes):
        if code == language:
            yield Pair(place, next(index), *pair)


def _xnli_lines(file: Path, task: XtremeTask) -> Iterator[XnliLine]:
    wanted = ("language", "sentence1", "sentence2", "gold_label")
    header: list[str] = []
    for number, line in text_lines(file):
        place, fields = f"{file}:{number}", line.split("\t")
        if not header:
            header = fields
            if missing := [name for name in wanted if name not in header]:
                raise DataError(f"{place}: no column {missing[0]!r}; XNLI's header names {', '.join(wanted)}")
            continue
        if len(fields) != len(header):
            raise DataError(f"{place}: {len(fields)} columns, but the header has {len(header)}")
        code, text_a, text_b, label = (fields[header.index(name)].strip() for name in wanted)
        label = OTHER_NAMES.get(label, label)
        check_label(label, task, place)
        yield place, code, (text_a, text_b, label)


def _same_lines(lines: Iterator[XnliLine], others: Iterator[XnliLine], file: Path, codes: Path) -> Iterator[XnliLine]:
    """`lines` with the languages of `others`."""
    for number, (line, other) in enumerate(zip_longest(lines, others), 2):
        if line is None or other is None:
            longer, shorter = (codes, file) if line is None else (file, codes)
            raise DataError(f"{shorter}:{number}: missing, but {longer} has it; they must match line by line")
        yield line[0], other[1], line[2]


def read_tagged(file: Path, task: XtremeTask) -> Iterator[Sentence]:
    """Lines of WORD<tab>TAG, with a blank line after each sentence; WORD alone if the labels are erased.

    An extra blank line is an empty sentence, which keeps its place in translations and predictions.
    """
    for start, index, lines in _chunks(file):
        tagged = [line for line in lines if line[1] is not None]
        if tagged and len(tagged) < len(lines):
            number = next(number for number, (_, tag) in enumerate(lines, start) if tag is None)
            raise DataError(f"{file}:{number}: no tag; a line is WORD<tab>TAG, in all lines or in none")
        for number, (_, tag) in enumerate(lines, start):
            if tag is not None:
                check_label(tag, task, f"{file}:{number}", "tag")
        tags = tuple(tag for _, tag in tagged if tag is not None) if tagged else None
        yield Sentence(f"{file}:{start}", index, tuple(word for word, _ in lines), tags)


def read_words(file: Path) -> Iterator[Sentence]:
    """The words of a file in the format of `read_tagged`; the second column is ignored.

    Trailing blank lines are empty sentences here too: translations may be empty.
    """
    for start, index, lines in _chunks(file, whole=True):
        yield Sentence(f"{file}:{start}", index, tuple(word for word, _ in lines))


def read_soft(file: Path, task: XtremeTask, labels: Path) -> Iterator[Sentence]:
    """Lines of WORD<tab>P;P;... with a probability for each label, in the order of the file `labels`.

    The result is in the task's label order and sums to one. Raises DataError: a wrong number of values, or values that
    are not probabilities.
    """
    order = _label_order(labels, task)
    places = [order.index(label) for label in task.labels]
    for start, index, lines in _chunks(file, whole=True):
        soft = []
        for number, (_, cell) in enumerate(lines, start):
            values = _probabilities(cell, len(order), f"{file}:{number}")
            soft.append(tuple(values[place] for place in places))
        yield Sentence(f"{file}:{start}", index, tuple(word for word, _ in lines), soft_tags=tuple(soft))


def _chunks(file: Path, whole: bool = False) -> Iterator[tuple[int, int, list[tuple[str, str | None]]]]:
    """(first line's number, index, [(word, cell beside it)]) of each sentence."""
    index, start = 0, 1
    lines: list[tuple[str, str | None]] = []
    after_start = False
    for number, text in text_lines(file, whole):
        if text.startswith(DOCUMENT_START) and not lines:
            start, after_start = number + 1, True
            continue
        if not text and after_start:
            start, after_start = number + 1, False
            continue
        after_start = False
        if not text:
            yield start, index, lines
            index, start, lines = index + 1, number + 1, []
            continue
        word, tab, cell = text.partition("\t")
        if "\t" in cell:
            raise DataError(f"{file}:{number}: {text.count(chr(9)) + 1} columns; a line is WORD<tab>TAG")
        lines.append((word.strip() or NO_WORD, cell.strip() if tab else None))
    if lines:
        yield start, index, lines


def _probabilities(cell: str | None, width: int, place: str) -> list[float]:
    try:
        values = [float(value) for value in (cell or "").split(";")]
    except ValueError as error:
        raise DataError(f"{place}: not numbers; a line is WORD<tab>P;P;..., one probability for each label") from error
    if len(values) != width:
        raise DataError(f"{place}: {len(values)} probabilities, but there are {width} labels")
    total = sum(values)
    if min(values) < 0 or not abs(total - 1) <= SUM_TOLERANCE:
        raise DataError(
            f"{place}: not probabilities (they sum to {total:.3g}); write the softmax of the teacher's logits"
        )
    return [value / total for value in values]


def _label(fields: list[str], columns: Columns, task: XtremeTask) -> str | None:
    if columns.label is None or columns.label >= len(fields):
        return None
    label = fields[columns.label]
    return OTHER_NAMES.get(label, label) if task.name == "xnli" else label


def _written_as_csv(file: Path) -> bool:
    """Whether a CSV writer wrote the file: each field that contains a quote is quoted, with doubled quotes.

    A CSV writer quotes a field only because of its content, so a text that is merely between quotes shows that none
    wrote the file.
    """
    quoted = (
        _quoted(field.strip())
        for _, line in text_lines(file)
        if '"' in line
        for field in line.split("\t")
        if '"' in field
    )
    return next(quoted, False) and all(quoted)


def _quoted(field: str) -> bool:
    inner = field[1:-1]
    return len(field) >= 4 and field[0] == field[-1] == '"' and '"' in inner and '"' not in inner.replace('""', "")


def _label_order(file: Path, task: XtremeTask) -> tuple[str, ...]:
    """The label order of a teacher's file, one label a line; the task's order if there is no such file."""
    if not file.is_file():
        return task.labels
    order = tuple(text.strip() for _, text in text_lines(file) if text.strip())
    if sorted(order) != sorted(task.labels):
        raise DataError(f"{file}: must name each label of {task.name} once: {', '.join(task.labels)}")
    return order
