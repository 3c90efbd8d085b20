"""Small files in the formats of XTREME, for tests: written as the benchmark's authors and scripts write them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

XNLI_HEADER = ("language", "gold_label", "b1", "b2", "p1", "p2", "sentence1", "sentence2", "promptID")


def write(file: Path, text: str) -> Path:
    """Exactly this text as UTF-8."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


def tsv(file: Path, rows: Iterable[Sequence[object]]) -> Path:
    """Raw tab-separated lines, nothing quoted."""
    return write(file, "".join("\t".join(map(str, row)) + "\n" for row in rows))


def by_csv_writer(file: Path, rows: Iterable[Sequence[str]]) -> Path:
    """As XTREME's script writes pairs: the csv module's quoting, CR LF."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows(rows)
    return file


def tagged(file: Path, sentences: Iterable[Sequence[Sequence[str]]]) -> Path:
    """One line per word with columns separated by tabs, a blank line after each sentence."""
    return write(file, "".join("".join("\t".join(word) + "\n" for word in words) + "\n" for words in sentences))


def xnli(file: Path, rows: Iterable[tuple[str, str, str, str]]) -> Path:
    """XNLI's own file of all languages. Rows: language, label, text, text."""
    lines = [(code, label, "-", "-", "-", "-", a, b, str(number)) for number, (code, label, a, b) in enumerate(rows)]
    return tsv(file, [XNLI_HEADER, *lines])


def question(id: str, text: str, *answers: tuple[str, int]) -> dict[str, Any]:
    return {"id": id, "question": text, "answers": [{"text": a, "answer_start": start} for a, start in answers]}


def squad(file: Path, *paragraphs: tuple[str, list[dict[str, Any]]]) -> Path:
    """Each paragraph: its context and questions."""
    data = [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]} for context, qas in paragraphs]
    return write(file, json.dumps({"version": "1.1", "data": data}, ensure_ascii=False))


def jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().splitlines()]
