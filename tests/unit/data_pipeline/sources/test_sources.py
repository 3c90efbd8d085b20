"""Sources: every format and layout gives the same Records by scan and by random access; errors name file and line."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_pipeline.config import ColumnMap, SourceConfig
from data_pipeline.records import BadRow, DataError, Message, Record
from data_pipeline.sources.formats import Shard
from data_pipeline.sources.sources import RecordReader, open_source

LANGUAGES = ("en", "sw", "th")
COLUMNS = {"id": "id", "language": "lang", "prompt": "question", "completion": "answer"}
# newlines, quotes, delimiters, scripts of 1 to 4 bytes a letter, text that looks like other types
ROWS = [
    {"id": "a", "lang": "en", "question": 'Say "hi",\nthen\tstop.', "answer": "hi"},
    {"id": "b", "lang": "sw", "question": "Je, watoto 3 wana vitabu vingapi?", "answer": "6"},
    {"id": "c", "lang": "th", "question": "สามบวกสี่เท่ากับเท่าไร 🙂\r\nตอบ", "answer": "7\n#### 7"},
    {"id": "d", "lang": "sw", "question": "null", "answer": '""'},
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")


def write_delimited(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(kind: str, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the rows in one of the formats; returns the SourceConfig fields that describe them."""
    if kind == "jsonl":
        write_jsonl(folder / "data.jsonl", rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet", row_group_size=3)
    elif kind in ("csv", "tsv"):
        write_delimited(folder / f"data.{kind}", rows, "," if kind == "csv" else "\t")
    elif kind == "hub":
        write_jsonl(folder / "data" / "train.jsonl", rows)
        return {"hub": "data"}
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "data"))
        return {"hub": "data"}
    return {"files": f"data.{kind}"}


def shards(folder: Path, **source: Any) -> tuple[SourceConfig, list[Shard]]:
    config = SourceConfig(name="source", **{"columns": COLUMNS, **source})
    return config, open_source(config, folder, folder / "cache")


def scan(folder: Path, **source: Any) -> list[Record | BadRow]:
    """Every row by the scan, after checking that random access, in reverse order and all at once, gives the same."""
    config, opened = shards(folder, **source)
    results = []
    for shard in opened:
        reader = RecordReader(config, shard, LANGUAGES)
        scanned = [(place, row, list(reader.records(row, place))) for place, row in shard.scan(hashlib.sha256())]
        together = shard.read_many([place for place, _, _ in scanned]) if scanned else []
        for (place, row, _), one_of_many in zip(reversed(scanned), reversed(together), strict=True):
            for again in (shard.read(place), one_of_many):
                if isinstance(row, BadRow):
                    assert isinstance(again, BadRow)
                    assert str(again) == str(row)
                else:
                    assert again == row
        results += [result for _, _, found in scanned for _, result in found]
    return results


def one_bad(folder: Path, **source: Any) -> str:
    (bad,) = [result for result in scan(folder, **source) if isinstance(result, BadRow)]
    assert "\n" not in str(bad)
    assert bad.exit_status == 2
    return str(bad)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "tsv", "hub", "saved"])
def test_every_format_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    records = scan(tmp_path, **write(kind, tmp_path, ROWS), response_language="en")
    conversations = [(r.conversation.response_language, r.conversation.messages) for r in records]
    assert [(r.id, r.group, r.language, *each) for r, each in zip(records, conversations, strict=True)] == [
        (
            row["id"],
            row["id"],
            row["lang"],
            "en",
            (Message("user", row["question"]), Message("assistant", row["answer"])),
        )
        for row in ROWS
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "tsv", "hub"])
def test_the_wide_layout_gives_one_record_per_language(kind: str, tmp_path: Path) -> None:
    rows = [
        {"q_en": "One?", "q_sw": "Moja?", "a": "1", "reply": "th"},
        {"q_en": "Two?", "q_sw": "", "a": "2", "reply": "th"},  # no translation: no record, and no error
    ]
    columns = {"prompt": "q_{language}", "completion": "a", "response_language": "reply"}
    records = scan(tmp_path, **write(kind, tmp_path, rows), languages=["en", "sw"], columns=columns)
    assert [(r.language, r.conversation.response_language, r.user_text) for r in records] == [
        ("en", "th", "One?"),
        ("sw", "th", "Moja?"),
        ("en", "th", "Two?"),
    ]
    assert records[0].group == records[1].group != records[2].group


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "hub"])
def test_messages_are_read_as_turns(kind: str, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Habari?"},
        {"role": "assistant", "content": "Nzuri."},
        {"role": "user", "content": "3+4?"},
        {"role": "assistant", "content": "7"},
    ]
    row = {"turns": json.dumps(turns) if kind == "csv" else turns, "rules": "Be brief."}
    columns = {"messages": "turns", "system": "rules"}
    (record,) = scan(tmp_path, **write(kind, tmp_path, [row]), language="sw", columns=columns)
    assert [m.role for m in record.conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert record.user_text == "Habari?\n3+4?"
    assert (record.language, record.conversation.response_language) == ("sw", "sw")
    assert record.id.endswith(":2" if kind == "csv" else ":1")  # the line or the row


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "user", "content": "?"}], "must hold a user turn and end with the assistant's answer"),
        ([{"role": "human", "content": "?"}], "role 'human'; it must be system, user or assistant"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}], "[1].content is empty"),
        ("[{", "'turns' is not valid JSON"),
        ([], "must hold a user turn"),
        ({"role": "user"}, "must be a list"),
    ],
)
def test_bad_messages_are_bad_rows_with_the_reason(turns: Any, reason: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"turns": turns}])
    error = one_bad(tmp_path, files="x.jsonl", language="en", columns={"messages": "turns"})
    assert error.startswith(f"{tmp_path}/x.jsonl:1: ")
    assert reason in error


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "hub"])
def test_sharegpt_turns_and_weights_are_read(kind: str, tmp_path: Path) -> None:
    """In tables, keys that only other turns have are null."""
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Habari?"},
        {"from": "gpt", "value": "Nzuri.", "weight": 0},
        {"from": "human", "value": "3+4?", "timestamp": "2024-01-01", "name": "Anna"},
        {"from": "gpt", "value": "7", "weight": 1.0, "tool_calls": [], "reasoning_content": ""},
    ]
    row = {"conversations": json.dumps(turns) if kind == "csv" else turns, "tools": None}
    (record,) = scan(tmp_path, **write(kind, tmp_path, [row]), language="sw", columns={"messages": "conversations"})
    assert record.conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "Habari?"),
        Message("assistant", "Nzuri.", trained=False),
        Message("user", "3+4?"),
        Message("assistant", "7"),
    )


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, ANSWER | {"weight": 0.5}], "'turns'[1].weight is 0.5; it must be 1 (trained on) or 0 (only read)"),
        ([USER, ANSWER | {"weight": "0"}], "'turns'[1].weight is '0'; it must be 1"),
        ([USER | {"weight": 1}, ANSWER], "'turns'[0].weight is 1 on a user turn; only the assistant's turns"),
        ([USER, ANSWER | {"weight": 0}], "'turns': every assistant turn has weight 0, so there is nothing to learn"),
        ([USER, ANSWER | {"reasoning_content": "hm"}], "'turns'[1] has 'reasoning_content': a reasoning text apart"),
        ([USER, ANSWER | {"thinking": "hm"}], "'turns'[1] has 'thinking': "),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}], "'turns'[1] has 'tool_calls': functions"),
        ([USER, ANSWER | {"function_call": {"name": "f"}}], "'turns'[1] has 'function_call': functions (tools)"),
        ([USER, {"role": "tool", "content": "3"}, ANSWER], "'turns'[1] has role 'tool': functions (tools) are not"),
        ([USER, {"from": "observation", "value": "3"}, ANSWER], "'turns'[1] has role 'observation': functions"),
        ([USER, ANSWER | {"train": False}], "'turns'[1] has 'train': mark the answers to train on by 'weight'"),
        ([USER | {"images": ["a.png"]}, ANSWER], "'turns'[0] has 'images': only text is trained on"),
        ([USER, {"from": "robot", "value": "!"}], "'turns'[1] is from 'robot'; it must be one of human, user, gpt"),
        ([USER, ANSWER | {"from": "gpt"}], "'turns'[1] has both 'role' and 'from'; give one"),
        ([USER, ANSWER | {"value": "!"}], "'turns'[1] has both 'content' and 'value'; give one"),
        ([USER, {"from": "gpt", "value": " "}], "'turns'[1].value is empty"),
        ([USER, {"role": "developer", "content": "!"}, ANSWER], "has role 'developer'; it must be system, user or"),
        (
            [USER, USER, ANSWER],
            "'turns': the turns are user, user, assistant: turn 2 is user; they must be an optional",
        ),
        ([ANSWER, USER, ANSWER], "'turns': the turns are assistant, user, assistant: turn 1 is assistant; they must"),
        ([USER, ANSWER, {"role": "system", "content": "."}, ANSWER], "turn 3 is system; they must be an optional"),
        ([USER, ANSWER] * 40 + [ANSWER], "user, assistant, ... (81 in all): turn 81 is assistant; they must be"),
    ],
)
def test_an_unsupported_turn_is_a_bad_row_that_names_it(turns: Any, reason: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"turns": [USER, ANSWER]}, {"turns": turns}])
    error = one_bad(tmp_path, files="x.jsonl", language="en", columns={"messages": "turns"})
    assert error.startswith(f"{tmp_path}/x.jsonl:2: ")
    assert reason in error


def test_a_system_column_and_a_system_turn_together_are_a_bad_row(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "x.jsonl", [{"rules": "Be brief.", "turns": [{"role": "system", "content": "."}, USER, ANSWER]}]
    )
    columns = {"messages": "turns", "system": "rules"}
    error = one_bad(tmp_path, files="x.jsonl", language="en", columns=columns)
    assert "'turns': the turns are system, system, user, assistant: turn 2 is system" in error


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "hub"])
@pytest.mark.parametrize("field", ["tools", "documents"])
def test_tools_and_documents_beside_the_turns_are_refused_by_name(kind: str, field: str, tmp_path: Path) -> None:
    """Tables are read by column: the field is checked although no column is mapped to it."""
    turns = [USER, ANSWER]
    rows = [
        {"turns": json.dumps(turns) if kind == "csv" else turns, field: value} for value in (None, '[{"name": "f"}]')
    ]
    source = {**write(kind, tmp_path, rows), "language": "en"}
    error = one_bad(tmp_path, **source, columns={"messages": "turns"})
    assert f"{field!r} beside 'turns': " in error
    mapped = scan(tmp_path, **source, columns={"messages": "turns", "system": field})
    assert [record.conversation.messages[0].role for record in mapped] == ["user", "system"], (
        "a mapped field is used as mapped"
    )


def test_byte_order_marks_and_crlf_are_ignored(tmp_path: Path) -> None:
    lines = ['"question","answer"', '"Habari,\r\ndunia?","ndiyo"', "", "Moja?,1", '"Mbili?","2"']
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    columns = {"prompt": "question", "completion": "answer"}
    records = scan(tmp_path, files="x.csv", language="sw", columns=columns)
    assert [(r.user_text, r.conversation.messages[-1].content) for r in records] == [
        ("Habari,\r\ndunia?", "ndiyo"),
        ("Moja?", "1"),
        ("Mbili?", "2"),
    ]
    assert [r.origin.rsplit(":")[-1] for r in records] == ["2", "5", "6"]  # lines, also after a quoted newline
    json_lines = [json.dumps({"question": q, "answer": "1"}) for q in ("Moja?", "Mbili?")]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + ("\r\n\r\n".join(json_lines)).encode())
    records = scan(tmp_path, files="x.jsonl", language="sw", columns=columns)
    assert [(r.user_text, r.id) for r in records] == [("Moja?", "x:1"), ("Mbili?", "x:3")]


GOOD = b'{"id": 1, "lang": "en", "question": "?", "answer": "!"}\n'
BAD_LINES = [
    (b'{"id": 2, "lang": "en", "question"\n', "not valid JSON (Expecting ':' delimiter at column 35)"),
    (b'["en", "?", "!"]\n', "a JSON list; each line must be one JSON object"),
    (b'{"id": 2, "lang": "en", "question": "?"}\n', "no field 'answer'; the row has 'id', 'lang', 'question'"),
    (b'{"id": 2, "lang": "en", "question": "?", "answer": ""}\n', "'answer' is empty"),
    (b'{"id": 2, "lang": "en", "question": "?", "answer": " \\n"}\n', "'answer' is empty"),
    (b'{"id": 2, "lang": "en", "question": null, "answer": "!"}\n', "'question' is empty"),
    (b'{"id": 2, "lang": "en", "question": 5, "answer": "!"}\n', "'question' is int; it must be text"),
    (b'{"id": 2, "lang": "en", "question": "caf\xe9", "answer": "!"}\n', "not UTF-8 (byte 0xe9, number 41 of the"),
    (b'{"id": 2, "lang": "en", "question": "\\ud800", "answer": "!"}\n', "'question' is not UTF-8"),
    (b'{"id": 2, "lang": "xx", "question": "?", "answer": "!"}\n', "language 'xx' is not declared; data.languages are"),
    (b'{"id": 2, "lang": "", "question": "?", "answer": "!"}\n', "'lang' is empty; it must name the row's language"),
    (b'{"id": true, "lang": "en", "question": "?", "answer": "!"}\n', "'id' is bool; it must be text"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_reported_with_place_and_reason(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"\n" + line + GOOD)
    source = {"files": "x.jsonl", "response_language": "en"}
    assert one_bad(tmp_path, **source).startswith(f"{tmp_path}/x.jsonl:3: {reason}")
    assert len(scan(tmp_path, **source)) == 3


def test_the_answers_language_must_be_declared_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"lang": "en", "reply": code, "q": "?", "a": "!"} for code in ("xx", "", "sw")])
    columns = {"language": "lang", "response_language": "reply", "prompt": "q", "completion": "a"}
    assert "x.jsonl:1: language 'xx' is not declared" in one_bad(tmp_path, files="x.jsonl", columns=columns)
    read = scan(tmp_path, files="x.jsonl", columns=columns)
    good = [record.conversation.response_language for record in read if isinstance(record, Record)]
    assert good == ["en", "sw"]  # an empty one is the prompt's


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'2,en,"never closed,!\n', "wrongly quoted: "),
        (b'2,en,"a" b,!\n', "wrongly quoted: "),
        (b"2,en,?\n", "3 fields, but the header has 4"),
        (b"2,en,caf\xe9,!\n", "'question' is not UTF-8"),
        (b"2,en,?,\n", "'answer' is empty"),
    ],
)
def test_a_bad_csv_row_affects_no_other_row(line: bytes, reason: str, tmp_path: Path) -> None:
    rows = [b'1,en,"two\nlines",!\n', line, b'3,en,"?",!\n', b"4,en,?,!\n"]
    (tmp_path / "x.csv").write_bytes(b"id,lang,question,answer\n" + b"".join(rows))
    assert one_bad(tmp_path, files="x.csv").startswith(f"{tmp_path}/x.csv:4: {reason}")
    good = [result.id for result in scan(tmp_path, files="x.csv") if isinstance(result, Record)]
    assert good == ["1", "3", "4"]


HEADER = "id\tlang\tquestion\tanswer\n"
QUOTES = HEADER + '1\ten\t"Who?" he said.\t"I."\n2\ten\t"a ""b"" c"\tsay "hi"\n3\ten\t"\t"\n'


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
def test_without_quoting_a_quote_is_a_character_like_others(tmp_path: Path, name: str) -> None:
    text = QUOTES if name == "x.tsv" else QUOTES.replace("\t", ",")
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = [record for record in scan(tmp_path, files=name, quoting="none") if isinstance(record, Record)]
    assert [tuple(message.content for message in record.conversation.messages) for record in found] == [
        ('"Who?" he said.', '"I."'), ('"a ""b"" c"', 'say "hi"'), ('"', '"'),
    ]  # fmt: skip


def test_quotes_read_as_csv_quoting_in_a_tsv_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.tsv").write_text(HEADER + '1\ten\ta "b" c\td\n2\ten\t"a"\tb\n3\ten\tc\t"d"\n', encoding="utf-8")
    assert len(scan(tmp_path, files="x.tsv")) == 3
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/x.tsv:3: a field begins with a quote, so it is read as CSV reads it")
    assert message.endswith("set the source's quoting: none")
    caplog.clear()
    scan(tmp_path, files="x.tsv", quoting="none")
    (tmp_path / "x.csv").write_text('id,lang,question,answer\n1,en,"a",b\n', encoding="utf-8")
    scan(tmp_path, files="x.csv")
    assert caplog.messages == []


def test_a_dataset_folder_with_glob_characters_is_refused(tmp_path: Path) -> None:
    write("hub", tmp_path / "data [v1]", ROWS)
    with pytest.raises(DataError, match=r"\[v1\]/data: datasets reads '\[' in a folder's name as a pattern; rename"):
        scan(tmp_path / "data [v1]", hub="data")
    write("saved", tmp_path / "saved [v1]", ROWS)
    assert len(scan(tmp_path / "saved [v1]", hub="data")) == len(ROWS)


def test_quoting_is_only_for_csv_and_tsv(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(DataError, match=r"x\.jsonl: source 'source' has quoting: none, which goes with CSV and"):
        scan(tmp_path, files="x.jsonl", quoting="none")
    with pytest.raises(ValidationError, match="quoting goes with CSV and TSV files"):
        SourceConfig(name="a", hub="b", quoting="none", language="en", columns=ColumnMap(prompt="p", completion="c"))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "is UTF-16, where"), ("utf-16-le", "is UTF-16 or not text"), ("utf-16-be", "is UTF-16 or")],
)
@pytest.mark.parametrize("quoting", [None, "none"])
def test_another_encoding_is_named_and_not_reported_as_wrong_quoting(
    tmp_path: Path, encoding: str, message: str, quoting: str | None
) -> None:
    (tmp_path / "x.csv").write_bytes('id,lang,question,answer\n1,en,"a\nb",c\n'.encode(encoding))
    with pytest.raises(DataError) as refused:
        scan(tmp_path, files="x.csv", quoting=quoting)
    assert str(refused.value).startswith(f"{tmp_path}/x.csv: {message}")
    assert str(refused.value).endswith("where UTF-8 is needed; iconv -t UTF-8 converts it")


def test_a_field_beyond_the_limit_is_reported_as_too_long(tmp_path: Path) -> None:
    long = "x" * 20_000_000
    (tmp_path / "x.csv").write_text(f"id,lang,question,answer\n1,en,{long},b\n2,en,a,b\n")
    assert one_bad(tmp_path, files="x.csv") == (
        f"{tmp_path}/x.csv:2: a field is longer than 16,777,216 characters; is a quote not closed, or meant as a "
        "character (quoting: none)?"
    )
    assert one_bad(tmp_path, files="x.csv", quoting="none").endswith("a field is longer than 16,777,216 characters")


def test_a_carriage_return_within_a_line_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"id,lang,question,answer\n1,en,a\rb,c\n2,en,a,b\n")
    assert ": a carriage return without a line feed within the line" in one_bad(tmp_path, files="x.csv")


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    table = pa.table({"lang": ["en"] * 3, "question": ["a", "b", "c"]})
    answers = pa.Array.from_buffers(pa.string(), 3, pa.array([b"x", b"\xff", b"z"], pa.binary()).buffers())
    pq.write_table(table.append_column("answer", answers), tmp_path / "x.parquet")
    columns = {"language": "lang", "prompt": "question", "completion": "answer"}
    assert "x.parquet:2: not UTF-8" in one_bad(tmp_path, files="x.parquet", columns=columns)


def test_parquet_dictionaries_may_change_between_batches(tmp_path: Path) -> None:
    rows = [{"lang": LANGUAGES[i % 2 + (i >= 600)], "question": f"q{i}", "answer": "!"} for i in range(1200)]
    parts = [pa.Table.from_pylist(part) for part in (rows[:600], rows[600:])]
    coded = [part.set_column(0, "lang", part["lang"].dictionary_encode()) for part in parts]
    with pq.ParquetWriter(tmp_path / "x.parquet", coded[0].schema) as writer:
        for part in coded:
            writer.write_table(part)
    columns = {"language": "lang", "prompt": "question", "completion": "answer"}
    records = scan(tmp_path, files="x.parquet", columns=columns)
    assert [(r.language, r.user_text) for r in records] == [(row["lang"], row["question"]) for row in rows]


def test_files_are_sorted_relative_to_data_dir_and_listed_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", ROWS[:1])
    (tmp_path / "in" / "d.jsonl").mkdir()
    write_jsonl(tmp_path / "in" / "[x].jsonl", ROWS[:1])
    _, opened = shards(tmp_path, files=["{data_dir}/in/c.jsonl", "in/?.jsonl", "in/[x].jsonl"])
    assert [shard.name for shard in opened] == ["in/c.jsonl", "in/a.jsonl", "in/b.jsonl", "in/[x].jsonl"]


def test_files_may_be_fsspec_addresses(tmp_path: Path) -> None:
    with fsspec.open("memory://crosslift/x.csv", "wb") as file:
        file.write('id,lang,question,answer\n1,sw,"Moja\nau?",1\n2,th,สอง,2\n'.encode())
    assert [r.user_text for r in scan(tmp_path, files="memory://crosslift/*.csv")] == ["Moja\nau?", "สอง"]
    with pytest.raises(DataError, match=r"no file matches memory://crosslift/\*\.tsv"):
        shards(tmp_path, files="memory://crosslift/*.tsv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": "*.parquet"}, r"source 'source': no file matches .*/\*\.parquet$"),
        ({"files": "folder"}, r"no file matches .*/folder; it is a directory: name the files in it"),
        ({"files": "x.jsonl.gz"}, r"x\.jsonl\.gz: source 'source' has format: auto, and the suffix '\.gz'"),
        (
            {"files": "x.jsonl", "columns": COLUMNS | {"completion": "output"}},
            r"x\.jsonl: source 'source' maps column 'output', which is not there; the columns are 'id', 'lang', 'q",
        ),
        (
            {"files": "x.csv", "languages": ["en"], "columns": {"prompt": "q_{language}", "completion": "answer"}},
            r"x\.csv: source 'source' maps column 'q_en', which is not there",
        ),
        (
            {"files": "x.csv", "columns": COLUMNS | {"system": "rules"}},
            r"x\.csv: source 'source' maps column 'rules', which is not there",
        ),
        (
            {"files": "x.jsonl", "columns": COLUMNS | {"language": "code"}},
            r"x\.jsonl: source 'source' maps column 'code', which is not there",
        ),
        ({"files": "x.jsonl", "format": "parquet"}, r"x\.jsonl: not a Parquet file"),
        ({"files": "twice.csv"}, r"twice\.csv:1: not a header line, which must name each column once: \['id', 'id'\]"),
        ({"hub": "folder"}, r"folder: split 'train' cannot be loaded \("),
        ({"hub": "hubdir", "split": "test"}, r"hubdir: split 'test' cannot be loaded \(Unknown split"),
    ],
)
def test_sources_that_cannot_be_opened_are_refused(source: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    write_jsonl(tmp_path / "hubdir" / "train.jsonl", ROWS)
    write_delimited(tmp_path / "x.csv", ROWS, ",")
    (tmp_path / "x.jsonl.gz").write_bytes(b"")
    (tmp_path / "twice.csv").write_text("id,id\n1,2\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message) as error:
        shards(tmp_path, **source)
    assert "\n" not in str(error.value)


def test_data_dir_in_a_pattern_needs_a_data_dir() -> None:
    source = SourceConfig(name="s", files="{data_dir}/x.jsonl", columns=COLUMNS)
    with pytest.raises(DataError, match=r"names \{data_dir\}, but data_dir is not set"):
        open_source(source, None, Path("cache"))


LONG = {"language": "lang", "prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"columns": LONG}, "exactly one of files and hub"),
        ({"files": "x", "hub": "y", "columns": LONG}, "exactly one of files and hub"),
        ({"files": [], "columns": LONG}, "files is empty"),
        ({"files": "x", "split": "test", "columns": LONG}, "go with hub"),
        ({"hub": "x", "format": "csv", "columns": LONG}, "format goes with files"),
        ({"files": "x", "columns": {"prompt": "q", "completion": "a"}}, "the language is not known"),
        ({"files": "x", "columns": LONG | {"prompt": "q_{language}"}}, "list the languages"),
        ({"files": "x", "columns": LONG | {"language": "{language}"}}, "long layout"),
        ({"files": "x", "languages": ["en"], "columns": {"prompt": "q", "completion": "a"}}, "a column must hold"),
        ({"files": "x", "languages": ["en", "en"], "columns": {"messages": "{language}"}}, "each language once"),
        ({"files": "x", "languages": ["en"], "language": "en", "columns": {"messages": "{language}"}}, "excludes"),
        ({"files": "x", "columns": LONG | {"promt": "q"}}, "Extra inputs"),
    ],
)
def test_inconsistent_configs_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceConfig(name="s", **source)


@pytest.mark.parametrize("columns", [{}, {"prompt": "q"}, {"messages": "m", "prompt": "q"}])
def test_either_messages_or_prompt_and_completion_are_required(columns: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="give messages, or"):
        ColumnMap(**columns)
