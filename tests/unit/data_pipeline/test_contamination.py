"""Held-out texts that are also in training are found by the index's hashes."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import contamination
from data_pipeline.config import SourceConfig
from data_pipeline.contamination import contaminated_rows
from data_pipeline.records import Split, normalized
from data_pipeline.sources.index import DataIndex, build_index
from data_pipeline.tasks.config import TaskConfig

CHAT = {"language": "language", "prompt": "question", "completion": "answer"}


def build(folder: Path, rows: list[dict[str, Any]], columns: dict[str, str], **options: Any) -> DataIndex:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    source = SourceConfig(name="rows", files="rows.jsonl", columns=columns)
    return build_index([source], ["en", "sw"], folder, folder / "index", **options)


def questions(index: DataIndex, rows: Any) -> set[str]:
    return {index.record(row).user_text for row in rows}


def corpus() -> list[dict[str, Any]]:
    return [
        {"id": f"{language}-{number}", "language": language, "question": f"Où est {number} {language}?", "answer": "1"}
        for number in range(30)
        for language in ("en", "sw")
    ]


@pytest.mark.parametrize("columns", [CHAT | {"id": "id"}, CHAT], ids=["other ids", "no ids"])
@pytest.mark.parametrize(
    "written",
    [
        lambda text: text,
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: f" {text.upper()}\u00a0 ".replace(" ", " \t"),
        lambda text: text.replace("?", "\uff1f"),
    ],
    ids=["unchanged", "NFD", "case and white space", "full-width"],
)
def test_a_held_out_text_in_training_is_found_despite_case_and_spacing(
    tmp_path: Path, columns: dict[str, str], written: Any
) -> None:
    held = build(tmp_path, corpus(), columns, heldout_items=10)
    assert contaminated_rows(held) == []
    texts = questions(held, [*held.rows(0, Split.HELD_OUT), *held.rows(1, Split.HELD_OUT)])
    assert len(texts) == 10
    copies = [
        {"id": f"copy-{number}", "language": "en", "question": written(text), "answer": "1"}
        for number, text in enumerate(sorted(texts))
    ]
    (tmp_path / "index").rename(tmp_path / "old")
    index = build(tmp_path, corpus() + copies, columns, heldout_items=10)
    found = contaminated_rows(index)
    for row, training in found:
        assert index.split[row] == Split.HELD_OUT
        assert index.split[training] == Split.TRAIN
        assert normalized(index.record(row).user_text) == normalized(index.record(training).user_text)
    held_now = [*index.rows(0, Split.HELD_OUT).tolist(), *index.rows(1, Split.HELD_OUT).tolist()]
    in_training = {
        normalized(index.record(row).user_text) for language in (0, 1) for row in index.rows(language).tolist()
    }
    assert {row for row, _ in found} == {
        row for row in held_now if normalized(index.record(row).user_text) in in_training
    }
    assert found, "English copies of texts of both languages"


def test_translations_of_a_held_out_item_are_not_contamination(tmp_path: Path) -> None:
    rows = [
        {"id": str(number), "language": language, "question": f"{number}?", "answer": "1"}
        for number in range(20)
        for language in ("en", "sw")
    ]
    assert contaminated_rows(build(tmp_path, rows, CHAT | {"id": "id"}, heldout_items=5)) == []


def test_unusable_rows_and_runs_without_held_out_items_have_no_contamination(tmp_path: Path) -> None:
    rows = [{**row, "question": "Same?"} for row in corpus()]
    assert contaminated_rows(build(tmp_path, rows, CHAT)) == []
    rows[3]["answer"] = rows[8]["answer"] = ""
    index = build(tmp_path, rows, CHAT, heldout_items=5, max_bad_rows=2)
    bad = set(index.bad.nonzero()[0].tolist())
    found = contaminated_rows(index)
    assert len(found) == 5
    assert not bad & {row for pair in found for row in pair}


def test_long_data_are_compared_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicate rows come after the first chunks."""
    rows = [{**row, "question": "Same?"} if n > 20 else row for n, row in enumerate(corpus())]
    index = build(tmp_path, rows, CHAT, heldout_items=20)
    whole = contaminated_rows(index)
    assert min(training for _, training in whole) > 20
    monkeypatch.setattr(contamination, "CHUNK", 7)
    assert contaminated_rows(index) == whole


def test_rows_of_a_task_are_compared_by_all_their_texts(tmp_path: Path) -> None:
    task = TaskConfig(kind="classification", labels=("no", "yes"))
    rows = [
        {
            "id": f"{language}-{number}",
            "language": language,
            "text_a": "Same.",
            "text_b": f"{number % 15} {language}",
            "label": "no",
        }
        for number in range(30)
        for language in ("en", "sw")
    ]
    columns = {name: name for name in rows[0]}
    index = build(tmp_path, rows, columns, heldout_items=8, task=task)
    assert contaminated_rows(index)
    for row, training in contaminated_rows(index):
        assert index.record(row).texts == index.record(training).texts
