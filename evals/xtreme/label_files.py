"""Readers of files in the layout of XTREME's scorer; a bad line is an error with its number.

`test-LANG.tsv` or `.json`, predictions or gold labels: UTF-8 with or without BOM, LF or CRLF; spaces around a line are
ignored. Gold files without labels are refused: XTREME's download script erases the labels of its test files (XNLI,
PAWS-X, PAN-X and UDPOS lose the column, answers become ""), and its readers replace them with a single label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.errors import EvalError

ERASED = "XTREME's download script erases test labels; take them from the original data"
_MIN_ERASED = 20  # from this many labels (taggers: sentences) on, all equal ones count as erased
_INDEX = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """Tags of one sentence; `line` is its first line, 1-based. Two blank lines in a row hold one without tags."""

    line: int
    tags: tuple[str, ...]


def read_labels(file: Path, labels: Sequence[str], gold: bool = False) -> list[str]:
    """One label a line, all of them among `labels`. Raises EvalError, also for erased gold labels."""
    lines = _lines(file)
    for number, line in enumerate(lines, 1):
        _check_label(file, number, line, labels, gold)
    if gold and len(lines) >= _MIN_ERASED and len(set(lines)) == 1:
        raise EvalError(f"{file}: all {len(lines)} labels are {lines[0]!r}; {ERASED}")
    return lines


def read_tags(file: Path, tags: Sequence[str], gold: bool = False) -> list[TaggedSentence]:
    """One tag a line, a blank line after a sentence; trailing blank lines are ignored. Raises EvalError."""
    sentences, first, current = [], 1, []
    for number, line in enumerate([*_lines(file), ""], 1):
        if line:
            _check_label(file, number, line, tags, gold)
            current.append(line)
        else:
            sentences.append(TaggedSentence(first, tuple(current)))
            first, current = number + 1, []
    while sentences and not sentences[-1].tags:
        sentences.pop()
    if not sentences:
        raise EvalError(f"{file}: holds no tags; a line is one tag, a blank line ends a sentence")
    found = {tag for sentence in sentences for tag in sentence.tags}
    if gold and len(sentences) >= _MIN_ERASED and len(found) == 1:
        raise EvalError(f"{file}: all tags of {len(sentences)} sentences are {found.pop()!r}; {ERASED}")
    return sentences


def read_pairs(file: Path) -> set[tuple[str, str]]:
    """BUCC's mined pairs, SOURCE-ID<tab>ENGLISH-ID a line; a repeated one counts once. Raises EvalError."""
    pairs = set()
    for number, line in enumerate(_lines(file), 1):
        source, tab, english = line.partition("\t")
        if not tab or not source or not english or "\t" in english:
            raise EvalError(f"{file}:{number}: {_shown(line)} is not SOURCE-ID<tab>ENGLISH-ID")
        pairs.add((source, english))
    return pairs


def read_indices(file: Path) -> list[int]:
    """Tatoeba's sentence numbers, one a line, counted from 0. Raises EvalError."""
    lines = _lines(file)
    for number, line in enumerate(lines, 1):
        if not _INDEX.fullmatch(line):
            raise EvalError(f"{file}:{number}: {_shown(line)} is not a sentence number; a line is 0, 1, 2, ...")
    return [int(line) for line in lines]


def read_answers(file: Path) -> dict[str, str]:
    """Predicted answers by question id, a JSON object of texts. Raises EvalError."""
    answers = _json(file)
    if not isinstance(answers, dict):
        raise EvalError(f"{file}: not a JSON object; predictions are {{question id: answer}}")
    for question, answer in answers.items():
        if not isinstance(answer, str):
            raise EvalError(f"{file}: the answer to {question!r} is {_shown(answer)}; an answer is a text, or empty")
    return answers


def read_questions(file: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Gold questions of SQuAD's JSON, in order: the id, and the accepted answers, at least one.

    Raises EvalError, also for an answer that is not in its context.
    """
    data = _json(file)
    try:
        articles = data["data"] if isinstance(data, dict) else data
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        found = [_question(file, item, part["context"]) for part in paragraphs for item in part["qas"]]
    except (KeyError, TypeError) as error:
        shape = "data > paragraphs > context, qas > id, answers > text"
        raise EvalError(f"{file}: not SQuAD's JSON ({shape}): {type(error).__name__} {error}") from error
    if not found:
        raise EvalError(f"{file}: holds no question")
    return found


def _question(file: Path, item: dict[str, Any], context: str) -> tuple[str, tuple[str, ...]]:
    name, answers = item["id"], tuple(answer["text"] for answer in item["answers"])
    if not isinstance(name, str):
        raise TypeError(f"id {name!r} is not a text")
    if not answers:
        raise EvalError(f"{file}: question {name!r} has no answer; a gold file has at least one for each")
    for answer in answers:
        if not answer:
            raise EvalError(f"{file}: the answer to {name!r} is empty; {ERASED}")
        if answer not in context:
            raise EvalError(f"{file}: the answer to {name!r}, {_shown(answer)}, is not in its context")
    return name, answers


def _lines(file: Path) -> list[str]:
    """Lines without surrounding spaces, including CR."""
    return [line.strip() for line in _text(file).removesuffix("\n").split("\n")]


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise EvalError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, endless brackets
        raise EvalError(f"{file}: not JSON that can be read: {error}") from error


def _text(file: Path) -> str:
    """The file's text without a BOM."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EvalError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise EvalError(f"{file}:{line}: not UTF-8") from error
    if not text.strip():
        raise EvalError(f"{file}: is empty")
    return text


def _check_label(file: Path, number: int, line: str, labels: Sequence[str], gold: bool) -> None:
    if line not in labels:
        hint = f" ({ERASED})" if gold else ""
        raise EvalError(f"{file}:{number}: {_shown(line)} is not one of {', '.join(labels)}{hint}")


def _shown(value: object) -> str:
    """At most 40 characters of what was found."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
