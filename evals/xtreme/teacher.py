"""A tagging model labels translated sentences for X-Mixup: `crosslift xtreme soft-labels`.

Reads canonical rows of translated training sentences and writes the same rows, in their order, with `soft_tags`: for
each word the probability of each label, the softmax of the word's pooled logits.

A translation has no gold tags, so X-Mixup learns from these (docs/methods.md, section 2.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from data_pipeline.console import Progress
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.xtreme.tasks import xtreme_task
from evals.errors import EvalError
from evals.xtreme.predict import EncoderPredictor

DIGITS = 5  # of a probability; a word's probabilities then sum to 1 within the 1e-3 that readers require
CHUNK = 2048  # rows in memory at a time


def soft_labels(
    predictor: EncoderPredictor,
    task: str,
    translations: Sequence[Path],
    output: Path,
) -> dict[str, int]:
    """Write `output/<name of the file>` for each file of translations; returns the number of rows by file name.

    `translations`: JSONL files, or folders of them. Raises EvalError for a task or model that does not tag or has other
    labels, and for an output that would replace its input; BadRow.
    """
    labels = xtreme_task(task).labels
    if xtreme_task(task).kind != "tagging":
        raise EvalError(f"task {task!r} is not a tagging task; soft labels are for udpos and panx")
    if predictor.kind != "tagging" or set(predictor.labels) != set(labels):
        has = ", ".join(predictor.labels) or f"none: its task is {predictor.kind}"
        raise EvalError(
            f"{predictor.model.name_or_path}: its labels are {has}; those of {task} are {', '.join(labels)}"
        )
    order = [predictor.labels.index(label) for label in labels]
    counts = {}
    files = _files(translations)
    with Progress("soft labels", None, "rows") as progress:
        for file in files:
            target = output / file.name
            if target.resolve() == file.resolve():
                raise EvalError(f"{target}: is the input; name another --output")
            if file.name in counts:
                raise EvalError(f"{file}: a second file of that name; outputs would replace each other")
            lines: list[str] = []
            for rows in _chunks(file):
                probabilities = predictor.tag_probabilities([record for record, _ in rows])
                for (_, row), words in zip(rows, probabilities, strict=True):
                    soft = [[round(float(value), DIGITS) for value in word[order]] for word in words]
                    kept = {key: value for key, value in row.items() if key != "tags"}
                    lines.append(json.dumps({**kept, "soft_tags": soft}, ensure_ascii=False) + "\n")
                progress.advance(len(rows))
            write_text(target, "".join(lines))
            counts[file.name] = len(lines)
    return counts


def _files(translations: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in translations:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise EvalError(f"{file}: no such file; translations are JSONL rows of tagging, words and no tags")
    if not files:
        raise EvalError(f"{', '.join(map(str, translations))}: holds no .jsonl file")
    return files


def _chunks(file: Path) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Records with the rows that they were read from, some thousand at a time."""
    with file.open(encoding="utf-8-sig") as stream:
        rows = (json.loads(line) for line in stream if not line.isspace())
        pairs = zip(read_task_file(file, "tagging"), rows, strict=True)
        while chunk := list(islice(pairs, CHUNK)):
            yield chunk
