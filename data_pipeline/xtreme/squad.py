"""Questions in SQuAD's JSON format, which all question answering tasks of XTREME use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.records import DataError
from data_pipeline.xtreme.items import Question


def read_gold(file: Path) -> Iterator[Question]:
    """Every question of an annotated file.

    Repeated ids get "#2", "#3" (XTREME's download script cuts TyDiQA's training ids so that they repeat). An answer
    without text is an erased one. A question without any answer entry, or with SQuAD 2.0's `is_impossible`, has no
    answer. An answer that is not at its offset is left out, and the question is marked. Raises DataError: not
    SQuAD's JSON.
    """
    seen: Counter[str] = Counter()
    for index, (question, raw) in enumerate(_questions(file)):
        answers, misplaced = [], None
        for text, start in raw:
            if not text:
                continue
            if start >= 0 and question.context.startswith(text, start):
                answers.append((text, start))
                continue
            found = question.context[max(start, 0) : max(start, 0) + len(text)][:40]
            misplaced = misplaced or (
                f"{question.place}: answer {text[:40]!r} is not at character {start} of the context, where there is"
                f" {found!r}"
            )
        seen[question.id] += 1
        suffix = f"#{seen[question.id]}" if seen[question.id] > 1 else ""
        yield replace(question, index=index, id=question.id + suffix, answers=tuple(answers), misplaced=misplaced)


def read_translated(file: Path) -> Iterator[Question]:
    """Every question of a machine-translated file; answers that are not at their offsets were lost in translation."""
    return (replace(question, misplaced=None) for question in read_gold(file))


def repeated_id(questions: list[Question]) -> str | None:
    """An id that the file gives to several questions."""
    return next((question.id.rpartition("#")[0] for question in questions if "#" in question.id), None)


def _questions(file: Path) -> Iterator[tuple[Question, list[tuple[str, int]]]]:
    for article in _data(file):
        try:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    answers = [(answer["text"], int(answer["answer_start"])) for answer in entry["answers"]]
                    place = f"{file}: question {entry['id']}"
                    texts = (context, entry["question"], *(text for text, _ in answers))
                    if not all(isinstance(text, str) for text in texts):
                        raise TypeError(f"question {entry['id']} has something else than text")
                    none = entry.get("is_impossible") is True or not answers
                    yield (
                        Question(place, 0, str(entry["id"]), entry["question"], context, unanswerable=none),
                        [] if none else answers,
                    )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: not SQuAD's JSON ({type(error).__name__}: {error}); {SHAPE}") from error


SHAPE = "it must hold data[].paragraphs[] with context and qas[], each with id, question and answers[]"


def _data(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
        return list(content["data"])
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not SQuAD's JSON ({type(error).__name__}: {error}); {SHAPE}") from error
