"""Task columns: every format gives the same Records, errors name place and reason, the index holds the rows too."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_pipeline.config import TASK_COLUMNS, ColumnMap, SourceConfig
from data_pipeline.records import BadRow, DataError, Example, Record, stable_hash
from data_pipeline.sources.index import DataIndex, build_index
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.rows import read_task_file

LANGUAGES = ["en", "th"]
LONG = {"id": "id", "group": "group", "language": "language"}
TASKS = {
    "classification": TaskConfig(kind="classification", labels=("no", "yes")),
    "tagging": TaskConfig(kind="tagging", labels=("N", "V", "O")),
    "qa": TaskConfig(kind="qa"),
    "text": TaskConfig(kind="text"),
}
CONTEXT = "สะพานเก่า ถูกสร้างใหม่ 1949"
# one row with all columns, and one with only those that training needs
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [
        {
            "text_a": 'Old, "bridge"\n', "text_b": "สะพาน", "label": "yes",
            "back_text_a": "The old bridge", "back_text_b": "Bridge",
        },
        {"text_a": "a", "text_b": "b", "label": "no"},
    ],
    "tagging": [
        {
            "words": ["The", "สะพาน", " "], "tags": ["O", "N", "O"], "back_words": ["Bridge", ","],
            "soft_tags": [[0.25, 0.25, 0.5], [1, 0, 0], [0.1, 0.2, 0.7004]],
        },
        {"words": ["Go"], "tags": ["V"]},
    ],
    "qa": [
        {
            "question": "ปีใด", "context": CONTEXT,
            "answers": [{"text": "1949", "answer_start": 23}, {"text": "สะพาน", "answer_start": 0}],
            "back_question": "When?", "back_context": "In 1949.", "back_answers": [{"text": "1949", "answer_start": 3}],
        },
        {"question": "?", "context": "x y", "answers": [{"text": "y", "answer_start": 2}]},
    ],
    "text": [{"text": "สวัสดี\nชาวโลก"}, {"text": "-"}],
}  # fmt: skip
EXAMPLES: dict[str, list[tuple[Example, Example | None]]] = {
    "classification": [
        (Example(('Old, "bridge"\n', "สะพาน"), "yes"), Example(("The old bridge", "Bridge"), "yes")),
        (Example(("a", "b"), "no"), None),
    ],
    "tagging": [
        (
            Example(
                ("The", "สะพาน", " "),
                tags=("O", "N", "O"),
                soft_tags=((0.25, 0.25, 0.5), (1.0, 0.0, 0.0), (0.1, 0.2, 0.7004)),
            ),
            Example(("Bridge", ",")),
        ),
        (Example(("Go",), tags=("V",)), None),
    ],
    "qa": [
        (
            Example(("ปีใด", CONTEXT), answers=(("1949", 23), ("สะพาน", 0))),
            Example(("When?", "In 1949."), answers=(("1949", 3),)),
        ),
        (Example(("?", "x y"), answers=(("y", 2),)), None),
    ],
    "text": [(Example(("สวัสดี\nชาวโลก",)), None), (Example(("-",)), None)],
}


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "group": f"g{n // 2}", "language": LANGUAGES[n % 2], **row} for n, row in enumerate(rows)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerow(names)
            for row in rows:
                cells = [row.get(name, "") for name in names]
                writer.writerow([c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cells])


def columns_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {name: name for row in rows for name in row}


def source(rows: list[dict[str, Any]], **changes: Any) -> SourceConfig:
    return SourceConfig(**{"name": "rows", "files": "*.jsonl", "columns": columns_of(rows)} | changes)


def build(folder: Path, kind: str, *sources: SourceConfig, **options: Any) -> DataIndex:
    options = {"task": TASKS[kind]} | options
    return build_index(sources, LANGUAGES, folder, folder / "cache", **options)


# --- reading


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str, suffix: str) -> None:
    rows = named(ROWS[kind])
    write(tmp_path / f"x.{suffix}", rows)
    index = build(tmp_path, kind, source(rows, files=f"x.{suffix}"))
    records = [index.record(number) for number in range(len(index))]
    assert [(record.example, record.back) for record in records] == EXAMPLES[kind]
    assert [(record.id, record.group, record.language) for record in records] == [
        ("r0", "g0", "en"),
        ("r1", "g0", "th"),
    ]
    line = 2 if suffix in ("csv", "tsv") else 1
    assert records[0].origin == f"{tmp_path}/x.{suffix}:{line}"


@pytest.mark.parametrize("kind", list(ROWS))
def test_the_arrays_of_the_index_match_the_records(tmp_path: Path, kind: str) -> None:
    rows = named(ROWS[kind])
    write(tmp_path / "x.jsonl", rows)
    index = build(tmp_path, kind, source(rows))
    for number in range(2):
        record = index.record(number)
        texts = EXAMPLES[kind][number][0].texts
        assert (record.texts, record.user_text) == (texts, "\n".join(texts))
        assert index.n_bytes[number] == record.n_bytes == sum(len(text.encode()) for text in texts)
        assert index.content[number] == stable_hash(record.user_text)
        assert index.group[number] == stable_hash("g0")
        assert index.translation(number, 1 - number) == 1 - number
        assert index.has_back[number] == (record.back is not None)
    with pytest.raises(DataError, match=r"x\.jsonl:1: a row of a task, where a conversation is needed"):
        _ = index.record(0).conversation


def test_a_conversation_cannot_be_read_as_a_row_of_a_task(tmp_path: Path) -> None:
    rows = [{"language": "en", "q": "?", "a": "!"}, {"language": "th", "q": "?", "a": "!"}]
    write(tmp_path / "x.jsonl", rows)
    chat = source(rows, columns={"language": "language", "prompt": "q", "completion": "a"})
    index = build_index([chat], LANGUAGES, tmp_path, tmp_path / "cache")
    assert index.record(0).texts == ("?", "!")
    with pytest.raises(DataError, match=r"x\.jsonl:1: a conversation, where a row of a task is needed"):
        _ = index.record(0).example


def test_a_file_that_changes_during_a_run_is_an_error(tmp_path: Path) -> None:
    rows = named(ROWS["tagging"])
    write(tmp_path / "x.jsonl", rows)
    index = build(tmp_path, "tagging", source(rows))
    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    (tmp_path / "x.jsonl").write_text(text.replace('"Go"', '"No"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:2: the file has changed since the run began"):
        index.record(1)


def test_the_wide_layout_gives_one_record_per_language(tmp_path: Path) -> None:
    rows = [{"p_en": "One", "p_th": "หนึ่ง", "label": "yes"}, {"p_en": "Two", "p_th": "", "label": "no"}]
    write(tmp_path / "x.jsonl", rows)
    wide = source(rows, languages=LANGUAGES, columns={"text_a": "p_{language}", "label": "label"})
    index = build(tmp_path, "classification", wide)
    records = [index.record(number) for number in range(len(index))]
    assert [(r.language, r.example) for r in records] == [
        ("en", Example(("One",), "yes")),
        ("th", Example(("หนึ่ง",), "yes")),
        ("en", Example(("Two",), "no")),
    ]
    assert records[0].group == records[1].group != records[2].group


def test_labels_and_translations_may_be_missing_in_some_files(tmp_path: Path) -> None:
    """English is gold; the translation has soft tags, and a back-translation. Typos are still errors."""
    english = [{"id": "1", "language": "en", "words": ["Go"], "tags": ["V"]}]
    thai = [{"id": "1", "language": "th", "words": ["ไป"], "soft_tags": [[0, 1, 0]], "back_words": ["Go"]}]
    both = source(english + thai, columns=columns_of(english + thai))
    for suffix in ("jsonl", "parquet", "csv"):
        folder = tmp_path / suffix
        folder.mkdir()
        write(folder / f"en.{suffix}", english)
        write(folder / f"th.{suffix}", thai)
        index = build(folder, "tagging", both.model_copy(update={"files": f"*.{suffix}"}))
        assert index.record(0) == Record(
            "1", "1", "en", f"{folder}/en.{suffix}:{2 if suffix == 'csv' else 1}", Example(("Go",), tags=("V",))
        )
        assert index.record(1).example == Example(("ไป",), soft_tags=((0.0, 1.0, 0.0),))
        assert index.record(1).back == Example(("Go",))
        typo = {**columns_of(english + thai), "back_words": "back"}
        wrong = source([], columns=typo, files=f"*.{suffix}")
        with pytest.raises(DataError, match=r"source 'rows': back_words is mapped to 'back', which no row of it has"):
            build(folder, "tagging", wrong)
    needed = source([], columns=columns_of(english) | {"words": "word"}, files="jsonl/*.jsonl")
    with pytest.raises(DataError, match=r"en\.jsonl: source 'rows' maps column 'word', which is not there"):
        build(tmp_path, "tagging", needed)


def test_answers_in_the_columnar_form_of_the_hub_are_read(tmp_path: Path) -> None:
    rows = named([{"question": "?", "context": "x y", "answers": {"text": ["y", "x"], "answer_start": [2, 0]}}] * 2)
    write(tmp_path / "x.parquet", rows)
    index = build(tmp_path, "qa", source(rows, files="x.parquet"))
    assert index.record(0).example.answers == (("y", 2), ("x", 0))


def test_integer_labels_are_taken_as_written(tmp_path: Path) -> None:
    rows = named([{"text_a": "a", "label": 0}, {"text_a": "b", "label": "1"}])
    write(tmp_path / "x.jsonl", rows)
    task = TaskConfig(kind="classification", labels=("0", "1"))
    index = build(tmp_path, "classification", source(rows), task=task)
    assert [index.record(number).example.label for number in range(2)] == ["0", "1"]


# --- bad rows

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("classification", {"text_a": " "}, "'text_a' is empty"),
    ("classification", {"text_b": None}, "'text_b' is empty"),
    ("classification", {"text_b": 3}, "'text_b' is int; it must be text"),
    ("classification", {"label": ""}, "no label, which training needs"),
    ("classification", {"label": "maybe"}, "label 'maybe' is not declared; task.labels are no, yes"),
    ("classification", {"label": 1.5}, "'label' is float; it must be text"),
    ("classification", {"back_text_a": ""}, "'back_text_a' is empty"),
    ("classification", {"back_text_b": ""}, "'back_text_b' is empty"),
    ("tagging", {"words": []}, "'words' is empty"),
    ("tagging", {"words": ["The", "", "."]}, "'words'[1] is empty"),
    ("tagging", {"words": ["The", 3, "."]}, "'words'[1] is int; it must be text"),
    ("tagging", {"words": ["The", "\ud800", "."]}, "'words'[1] is not UTF-8"),
    ("tagging", {"words": {"a": 1}}, "'words' is dict; it must be a list"),
    ("tagging", {"words": "The bridge"}, "'words' is not valid JSON"),
    ("tagging", {"words": '"The"'}, "'words' is str; it must be a list"),
    ("tagging", {"tags": ["O", "N"]}, "'tags' has 2 entries; there are 3 words"),
    ("tagging", {"tags": ["O", "N", "X"]}, "tag 'X' is not declared; task.labels are N, V, O"),
    ("tagging", {"tags": ["O", "N", None]}, "'tags'[2] is empty"),
    ("tagging", {"tags": None, "soft_tags": None}, "neither tags nor soft_tags, one of which training needs"),
    ("tagging", {"soft_tags": [[0, 1, 0]] * 2}, "'soft_tags' has 2 entries; there are 3 words"),
    ("tagging", {"soft_tags": [[0, 1]] * 3}, "soft_tags have 2 numbers a word; task.labels are 3"),
    ("tagging", {"soft_tags": [[0, 1, 0], [1, 0], [1, 0, 0]]}, "'soft_tags'[1] has 2 numbers, the words before it 3"),
    ("tagging", {"soft_tags": [[0, 1, 0]] * 2 + [[0.5, 0.4, 0.05]]}, "'soft_tags'[2] must sum to 1; the sum is 0.95"),
    ("tagging", {"soft_tags": [[0, 1, 0]] * 2 + [[1.5, -0.5, 0]]}, "'soft_tags'[2] must be probabilities, between 0 "),
    ("tagging", {"soft_tags": [[0, 1, 0], [True, 0, 0], [1, 0, 0]]}, "'soft_tags'[1] is not a list of numbers"),
    ("tagging", {"soft_tags": [0, 1, 0]}, "'soft_tags'[0] is not a list of numbers"),
    ("tagging", {"back_words": ["a", ""]}, "'back_words'[1] is empty"),
    ("qa", {"question": ""}, "'question' is empty"),
    ("qa", {"context": None}, "'context' is empty"),
    ("qa", {"answers": []}, "no answers, which training needs"),
    (
        "qa", {"answers": [{"text": "1949", "answer_start": 5}]},
        "'answers'[0] '1949' is not at character 5 of the context; it is at 23",
    ),
    (
        "qa", {"answers": [{"text": "1950", "answer_start": 23}]},
        "'answers'[0] '1950' is not at character 23 of the context; the context does not contain it",
    ),
    ("qa", {"answers": [{"text": "1949", "answer_start": -4}]}, "'answers'[0].answer_start is -4; it must be a number"),
    ("qa", {"answers": [{"text": "1949"}]}, "'answers'[0].answer_start is None; it must be a number"),
    ("qa", {"answers": [{"text": "1949", "answer_start": True}]}, "'answers'[0].answer_start is True; it must be a"),
    ("qa", {"answers": [{"text": "", "answer_start": 0}]}, "'answers'[0].text is empty"),
    ("qa", {"answers": ["1949"]}, "'answers' must be a list of {text, answer_start}"),
    ("qa", {"answers": {"text": ["1949"], "answer_start": []}}, "'answers' must have as many starts as texts"),
    ("qa", {"back_context": ""}, "'back_context' is empty"),
    ("qa", {"back_answers": [{"text": "1950", "answer_start": 3}]}, "'back_answers'[0] '1950' is not at character 3"),
    ("text", {"text": "\n"}, "'text' is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "reason"), BAD)
def test_a_bad_row_is_reported_with_place_and_reason(
    tmp_path: Path, kind: str, change: dict[str, Any], reason: str
) -> None:
    full = ROWS[kind][0]
    rows = named([full, full, full | change, full])
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as error:
        build(tmp_path, kind, source(rows))
    assert str(error.value).startswith(f"{tmp_path}/x.jsonl:5: {reason}")
    assert "\n" not in str(error.value)
    index = build(tmp_path, kind, source(rows), max_bad_rows=1)
    assert index.bad.tolist() == [False, False, True, False]
    with pytest.raises(BadRow, match=re.escape(f"x.jsonl:5: {reason}")):
        index.record(2)


@pytest.mark.parametrize("cell", ["[", "['a']", "a b"])
def test_bad_json_in_a_cell_of_a_table_is_reported_with_its_line(tmp_path: Path, cell: str) -> None:
    rows = named([{"words": ["a"], "tags": ["N"]}, {"words": cell, "tags": ["N"]}])
    write(tmp_path / "x.csv", rows)
    with pytest.raises(DataError, match=r"x\.csv:3: 'words' is not valid JSON \("):
        build(tmp_path, "tagging", source(rows, files="x.csv"))


def test_a_translation_may_be_missing_in_a_row(tmp_path: Path) -> None:
    for kind, rows in ROWS.items():
        blanks = {name: "" for name in rows[0] if name.startswith("back_")}
        write(tmp_path / "x.jsonl", named([rows[0], rows[0] | blanks]))
        index = build(tmp_path, kind, source(named(rows)))
        assert index.record(1).back is None
        assert (index.record(0).back is None) == (kind == "text")


# --- reading without an index


@pytest.mark.parametrize("kind", list(ROWS))
def test_a_canonical_file_is_read_with_and_without_labels(tmp_path: Path, kind: str) -> None:
    rows = named(ROWS[kind])
    write(tmp_path / "x.jsonl", rows)
    assert [(r.example, r.back) for r in read_task_file(tmp_path / "x.jsonl", kind)] == EXAMPLES[kind]
    bare = [
        {name: row[name] for name in row if name in ("id", "language", "text_b", *TASK_COLUMNS[kind][0])}
        for row in rows
    ]
    write(tmp_path / "bare.jsonl", bare)
    found = list(read_task_file(tmp_path / "bare.jsonl", kind))
    assert [record.example for record in found] == [Example(example.texts) for example, _ in EXAMPLES[kind]]
    assert [(record.id, record.group, record.origin) for record in found] == [
        (f"r{n}", f"r{n}", f"{tmp_path}/bare.jsonl:{n + 1}") for n in range(2)
    ]


def test_a_canonical_file_with_a_bad_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "1", "language": "en", "text_a": "a"}\n{"id": 2,\n')
    with pytest.raises(BadRow, match=r"x\.jsonl:2: not valid JSON"):
        list(read_task_file(tmp_path / "x.jsonl", "classification"))
    (tmp_path / "x.jsonl").write_text('{"id": "1", "language": "en"}\n')
    with pytest.raises(BadRow, match=r"x\.jsonl:1: no field 'text_a'; the row has 'id', 'language'"):
        list(read_task_file(tmp_path / "x.jsonl", "classification"))
    pair, single = named([{"text_a": "a", "text_b": "b"}, {"text_a": "a"}])
    for rows, reason in (([pair, single], "no field 'text_b'"), ([single, pair], "'text_b' is given, but not in")):
        write(tmp_path / "x.jsonl", rows)
        with pytest.raises(BadRow, match=rf"x\.jsonl:2: {reason}"):
            list(read_task_file(tmp_path / "x.jsonl", "classification"))


# --- combinations of columns and tasks


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("tagging", None, "source 'rows' has the columns of tagging, so the run needs 'data.task' with that kind"),
        ("tagging", "qa", "source 'rows' has the columns of tagging, but data.task.kind is 'qa'"),
    ],
)
def test_sources_must_be_of_the_tasks_kind(tmp_path: Path, kind: str, task: str | None, message: str) -> None:
    rows = named(ROWS[kind])
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=re.escape(message)):
        build(tmp_path, kind, source(rows), task=TASKS[task] if task else None)


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa"])
def test_training_needs_a_column_of_labels(tmp_path: Path, kind: str) -> None:
    rows = [{"id": "1", "language": "en", **{what: ROWS[kind][0][what] for what in TASK_COLUMNS[kind][0]}}]
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        DataError, match=r"source 'rows' maps no (label|tags or soft_tags|answers), which training needs"
    ):
        build(tmp_path, kind, source(rows))


def test_other_labels_change_the_fingerprint_of_the_index(tmp_path: Path) -> None:
    rows = named(ROWS["tagging"])
    write(tmp_path / "x.jsonl", rows)
    first = build(tmp_path, "tagging", source(rows))
    other = TaskConfig(kind="tagging", labels=("V", "N", "O"))
    second = build(tmp_path, "tagging", source(rows), task=other)
    assert {key for key in first.fingerprint if first.fingerprint[key] != second.fingerprint[key]} == {"task"}
    pooled = TASKS["tagging"].model_copy(update={"word_pooling": "first"})
    assert build(tmp_path, "tagging", source(rows), task=pooled).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text_a": "a", "words": "w"},
            r"'text_a' belongs to classification and 'words' to tagging: a source is of one",
        ),
        ({"text": "a", "words": "w"}, r"'words' belongs to tagging and 'text' to text"),
        (
            {"prompt": "p", "completion": "c", "label": "l"},
            r"'prompt' belongs to a conversation and 'label' to classif",
        ),
        ({"question": "q", "context": "c", "system": "s"}, r"'system' belongs to a conversation and 'question' to qa"),
        (
            {"words": "w", "response_language": "r"},
            r"'response_language' belongs to a conversation and 'words' to tagg",
        ),
        ({"label": "l"}, "'label' needs 'text_a' too"),
        ({"question": "q"}, "'question' needs 'context' too"),
        ({"tags": "t"}, "'tags' needs 'words' too"),
        ({"text_a": "a", "back_text_b": "b"}, "'back_text_b' needs 'back_text_a' too"),
        ({"text_a": "a", "back_text_a": "a", "back_text_b": "b"}, "'back_text_b' needs 'text_b' too"),
        (
            {"text_a": "a", "text_b": "b", "back_text_a": "c"},
            "texts come in pairs, so 'back_text_a' needs 'back_text_b'",
        ),
        ({"question": "q", "context": "c", "back_question": "b"}, "'back_question' needs 'back_context' too"),
        ({"question": "q", "context": "c", "back_answers": "b"}, "'back_answers' needs 'back_context' too"),
    ],
)
def test_inconsistent_columns_are_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ColumnMap(**columns)


@pytest.mark.parametrize("kind", list(TASK_COLUMNS))
def test_each_kind_is_recognised_by_its_columns(kind: str) -> None:
    needed, others = TASK_COLUMNS[kind]
    assert ColumnMap(**{what: what for what in needed}).kind == kind
    assert ColumnMap(**{what: what for what in (*needed, *others)}).kind == kind
    assert ColumnMap(prompt="p", completion="c").kind == "chat"
    with pytest.raises(ValidationError, match=f"response_language goes with conversations, not with {kind}"):
        SourceConfig(
            name="s", files="x", language="en", response_language="th", columns={what: what for what in needed}
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "tagging"}, "kind 'tagging' needs 'labels', at least two"),
        ({"kind": "classification", "labels": ["a"]}, "kind 'classification' needs 'labels', at least two"),
        ({"kind": "qa", "labels": ["a", "b"]}, "'labels' goes with kind 'classification' and 'tagging', not with 'qa'"),
        ({"kind": "tagging", "labels": ["a", "b", "a"]}, "'labels' names a label twice"),
        ({"kind": "text", "doc_stride": 3}, "'doc_stride' goes with kind 'qa' and 'tagging', not with 'text'"),
        ({"kind": "qa", "mask_probability": 0.2}, "'mask_probability' goes with kind 'text', not with 'qa'"),
        ({"kind": "text", "word_pooling": "first"}, "'word_pooling' goes with kind 'tagging', not with 'text'"),
        ({"kind": "text", "mask_probability": 1}, "less than 1"),
        ({"kind": "ner"}, "'classification', 'tagging', 'qa' or 'text'"),
    ],
)
def test_an_inconsistent_task_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskConfig(**values)


def test_a_resolved_task_is_the_same_task() -> None:
    for task in TASKS.values():
        assert TaskConfig(**task.model_dump(mode="json")) == task
