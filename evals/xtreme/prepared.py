"""A prepared task's folder for evaluation: rows by language, row counts, gold labels in the scorer's layout.

The folder holds `{train,dev,test}/<language>.jsonl` of canonical rows (`data_pipeline.xtreme.prepare`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.config import TASK_COLUMNS
from data_pipeline.records import Record
from data_pipeline.sources.cells import blank
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.xtreme.tasks import XtremeTask
from evals.errors import EvalError
from evals.xtreme.predict import write_predictions

CHECKED_ROWS = 100  # first rows of a file that are checked


def split_files(folder: Path, split: str, task: XtremeTask) -> dict[str, Path]:
    """The files of a split by language, in the task's order; none if the split does not exist."""
    files = {language: folder / split / f"{language}.jsonl" for language in task.languages}
    return {language: file for language, file in files.items() if file.is_file() and file.stat().st_size}


def read_records(file: Path, task: XtremeTask) -> list[Record]:
    """All rows of a file. Raises BadRow with file and line."""
    assert task.kind != "retrieval"  # retrieval has no row files
    return list(read_task_file(file, task.kind))


def count_rows(file: Path) -> int:
    """Number of rows of a file: its lines that are not blank."""
    with file.open("rb") as stream:
        return sum(1 for line in stream if not line.isspace())


def filled_columns(columns: Mapping[str, str], task: XtremeTask, files: Iterable[Path]) -> dict[str, str]:
    """`columns` without optional ones that are empty in all rows of the files, which an index would refuse."""
    assert task.kind != "retrieval"
    empty = {column for what, column in columns.items() if what in ("group", *TASK_COLUMNS[task.kind][1])}
    for file in files:
        with file.open(encoding="utf-8-sig") as stream:
            for line in stream:
                if not empty:
                    return dict(columns)
                if not line.isspace():
                    row = json.loads(line)
                    empty -= {column for column in empty if not blank(row.get(column))}
    return {what: column for what, column in columns.items() if column not in empty}


def check_training(
    files: Mapping[str, Path], task: XtremeTask, *, several: bool, wants_back: bool, dominant: str
) -> None:
    """Check that training files have what the method learns from: labels, shared items, back-translations.

    Reads the first rows of each file. Raises EvalError that names the file and the remedy.
    """
    assert task.kind != "retrieval"
    backs = False
    for language, file in files.items():
        records = list(islice(read_task_file(file, task.kind), CHECKED_ROWS))
        example = records[0].example
        if task.kind == "tagging" and example.tags is None and example.soft_tags is None:
            raise EvalError(
                f"{file}:1: neither tags nor soft_tags; a teacher writes them: `crosslift xtreme soft-labels MODEL"
                f" --task {task.name} --translations {file} --output DIR`, then --soft-labels DIR"
            )
        if task.kind == "classification" and example.label is None:
            raise EvalError(f"{file}:1: no label, which training needs")
        if task.kind == "qa" and example.answers is None:
            raise EvalError(f"{file}:1: no answers, which training needs")
        backs = backs or (language != dominant and any(record.back is not None for record in records))
    if several and len(files) < 2:
        raise EvalError(
            f"{', '.join(map(str, files.values()))}: only {dominant!r}, but the method learns from translations; give"
            " --translations DIR"
        )
    if wants_back and not backs:
        raise EvalError(
            f"{next(iter(files.values())).parent}: no back-translations (back_* fields), which scheduled sampling of"
            " sources needs; add them, or set objective.source_schedule=null for gold sources only"
        )


def write_gold(file: Path, task: XtremeTask, records: Sequence[Record]) -> bool:
    """Write gold labels in the layout of XTREME's scorer; False, and no file, if the rows have none.

    Raises EvalError if only some have them, and for repeated question ids.
    """
    field = {"classification": "label", "tagging": "tags", "qa": "answers"}[task.kind]
    labels: list[Any] = [getattr(record.example, field) for record in records]
    filled = [(record, label) for record, label in zip(records, labels, strict=True) if record.example.texts]
    without = next((record for record, label in filled if label is None), None)
    if all(label is None for _, label in filled):
        return False
    if without is not None:
        raise EvalError(f"{without.origin}: has no label, but other rows of the file have one; all or none must")
    if task.kind == "qa":
        write_text(file, json.dumps(_squad(file, records), ensure_ascii=False) + "\n")
    else:
        write_predictions(file, task.kind, records, labels)
    return True


def gold_file(folder: Path, task: XtremeTask, language: str) -> Path:
    """The path below `folder` at which the scorer expects a language's labels or predictions."""
    return folder / task.name / f"test-{language}.{'json' if task.kind == 'qa' else 'tsv'}"


def _squad(file: Path, records: Sequence[Record]) -> dict[str, Any]:
    if len({record.id for record in records}) < len(records):
        raise EvalError(f"{records[0].origin}: question ids are repeated in this file; {file.name} needs unique ones")
    paragraphs = []
    for record in records:
        question, context = record.example.texts
        answers = [{"text": text, "answer_start": start} for text, start in record.example.answers or ()]
        entry = {"id": record.id, "question": question, "answers": answers}
        paragraphs.append({"context": context, "qas": [entry]})
    return {"data": [{"title": "", "paragraphs": paragraphs}]}
