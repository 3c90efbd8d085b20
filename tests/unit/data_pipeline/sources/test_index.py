"""The index: its arrays, held-out items, bad rows, and its files on disk."""

import json
import multiprocessing
import os
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.console import Progress
from data_pipeline.records import BadRow, DataError, Split, stable_hash
from data_pipeline.sources.formats import JsonLines, Place
from data_pipeline.sources.index import DataIndex, build_index
from data_pipeline.sources.scan import Arrays, Scan

LANGUAGES = ["en", "sw", "th"]
COLUMNS = {"id": "id", "language": "lang", "prompt": "question", "completion": "answer"}


def row(item: object, language: str, answer: str = "7") -> dict[str, Any]:
    return {"id": str(item), "lang": language, "question": f"สวัสดี {item} {language}?", "answer": answer}


def write(path: Path, rows: list[dict[str, Any] | str]) -> None:
    lines = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def source(**changes: Any) -> SourceConfig:
    return SourceConfig(**{"name": "items", "files": "*.jsonl", "columns": COLUMNS} | changes)


def build(folder: Path, *sources: SourceConfig, languages: list[str] = LANGUAGES, **options: Any) -> DataIndex:
    return build_index(sources or [source()], languages, folder, folder / "cache", **options)


@pytest.fixture
def parallel(tmp_path: Path) -> Path:
    """40 items in three files of one language each; Swahili lacks every fourth item, Thai is in reverse order."""
    write(tmp_path / "en.jsonl", [row(item, "en") for item in range(40)])
    write(tmp_path / "sw.jsonl", [row(item, "sw") for item in range(40) if item % 4])
    write(tmp_path / "th.jsonl", [row(item, "th") for item in reversed(range(40))])
    return tmp_path


def check_whole(index: DataIndex) -> None:
    """All arrays, recomputed from the records one by one."""
    sections: dict[tuple[int, bool], list[int]] = {}
    for number in range(len(index)):
        record = index.record(number)
        language = index.languages.index(record.language)
        assert index.language[number] == language
        assert index.group[number] == stable_hash(record.group)
        assert index.content[number] == stable_hash(record.user_text)
        assert index.n_bytes[number] == sum(len(message.content.encode()) for message in record.conversation.messages)
        split = Split.HELD_OUT if stable_hash(record.group) in index.groups_heldout.tolist() else Split.TRAIN
        assert index.split[number] == split
        sections.setdefault((language, split), []).append(number)
    for (language, split), numbers in sections.items():
        assert index.rows(language, split).tolist() == numbers  # file order
        for number in range(len(index)):
            same = [n for n in numbers if index.group[n] == index.group[number]]
            expected = same[0] if same and index.split[number] == split else -1
            if index.split[number] == split:
                assert index.translation(number, language) == expected


@pytest.mark.parametrize("heldout_items", [0, 7])
def test_arrays_agree_with_the_records(parallel: Path, heldout_items: int) -> None:
    index = build(parallel, heldout_items=heldout_items, seed=3)
    assert len(index) == 40 + 30 + 40
    assert len(index.groups_heldout) == heldout_items
    check_whole(index)


def test_wide_parquet_agrees_with_the_records(tmp_path: Path) -> None:
    rows = [{f"q_{code}": f"{code} {i}?" for code in LANGUAGES[: 2 + i % 2]} | {"a": "1"} for i in range(50)]
    rows[0]["q_th"] = None
    schema = pa.schema([(column, pa.string()) for column in ("q_en", "q_sw", "q_th", "a")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "x.parquet", row_group_size=8)
    wide = source(files="x.parquet", languages=LANGUAGES, columns={"prompt": "q_{language}", "completion": "a"})
    index = build(tmp_path, wide, heldout_items=5)
    assert [len(index.rows(code)) + len(index.rows(code, Split.HELD_OUT)) for code in range(3)] == [50, 50, 25]
    check_whole(index)


# Columns that rows of JSONL may lack, and rows of which each lacks some of them.
GAPS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        {"languages": LANGUAGES, "columns": {"id": "id", "prompt": "q_{language}", "completion": "a_{language}"}},
        [
            {"id": "1", "q_en": "One?", "a_en": "1", "q_th": "หนึ่ง?", "a_th": "๑"},
            {"id": "2", "q_en": "Two?", "a_en": "2", "q_sw": "Mbili?", "a_sw": "2"},
        ],
    ),
    (
        {"columns": {"system": "rules", "response_language": "said", **COLUMNS}},
        [row(1, "sw"), row(2, "en") | {"said": "th"}, row(3, "th") | {"rules": "Be brief."}],
    ),
    (
        {"language": "th", "columns": COLUMNS},
        [{name: value for name, value in row(1, "th").items() if name != "lang"}, row(2, "en"), row(3, "sw")],
    ),
]


@pytest.mark.parametrize(("changes", "rows"), GAPS, ids=["wide", "system and response_language", "language"])
def test_which_row_lacks_a_column_does_not_matter(
    changes: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = []
    for order in permutations(rows):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        write(folder / "x.jsonl", list(order))
        index = build(folder, source(**changes))
        records = [replace(index.record(number), origin="") for number in range(len(index))]
        found.append(sorted(records, key=lambda record: (record.id, record.language)))
        check_whole(index)
    assert found == [found[0]] * len(found)
    write(tmp_path / "empty.jsonl", [])  # nor do empty files or files with only some of the columns
    for number, each in enumerate(rows):
        write(tmp_path / f"{number}.jsonl", [each])
    assert len(build(tmp_path, source(**changes))) == len(found[0])


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"languages": ["en", "sw"], "columns": {"prompt": "{language}", "completion": "answer"}}, "sw"),
        ({"languages": ["en"], "columns": {"prompt": "q_{language}", "completion": "answer"}}, "q_en"),
        ({"columns": COLUMNS | {"system": "rule"}}, "rule"),
        ({"columns": COLUMNS | {"response_language": "says"}}, "says"),
        ({"language": "en", "columns": COLUMNS | {"language": "code"}}, "code"),
    ],
)
def test_a_column_that_no_row_has_is_refused_with_the_existing_ones(
    changes: dict[str, Any], column: str, tmp_path: Path
) -> None:
    write(tmp_path / "x.jsonl", ["{", *(row(item, code) | {"en": "One?"} for item in range(2) for code in LANGUAGES)])
    with pytest.raises(DataError) as caught:
        build(tmp_path, source(**changes), max_bad_rows=1)
    assert str(caught.value) == (
        f"{tmp_path}/x.jsonl: source 'items' maps column {column!r}, which no row of it has;"
        " the columns of the first are 'id', 'lang', 'question', 'answer', 'en'"
    )
    write(tmp_path / "x.jsonl", ["{"])
    with pytest.raises(DataError, match=r"x\.jsonl:1: not valid JSON"):
        build(tmp_path, source(**changes))


def test_items_are_held_out_in_every_language_and_depend_on_the_seed(parallel: Path) -> None:
    index = build(parallel, heldout_items=6, seed=1)
    expected = sorted((stable_hash(i) for i in range(40)), key=lambda group: stable_hash(1, group))[:6]
    assert index.groups_heldout.tolist() == sorted(expected)
    for code in range(3):
        training = {index.record(n).group for n in index.rows(code).tolist()}
        held_out = {index.record(n).group for n in index.rows(code, Split.HELD_OUT).tolist()}
        assert {stable_hash(group) for group in held_out} <= set(expected)
        assert not {stable_hash(group) for group in training} & set(expected)
    assert build(parallel, heldout_items=6, seed=2).groups_heldout.tolist() != sorted(expected)
    with pytest.raises(DataError, match="heldout_items is 40, but the sources have only 40 items"):
        build(parallel, heldout_items=40)


def test_a_translation_from_the_same_source_is_preferred(tmp_path: Path) -> None:
    """Ids that start at 0 in every data set are common."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.jsonl", [row(item, code) for code in ("en", "sw") for item in range(3)])
    sources = [source(name=name, files=f"{name}/*.jsonl") for name in ("a", "b")]
    index = build(tmp_path, *sources, languages=["en", "sw"])
    assert [index.translation(number, 0) for number in (3, 4, 5, 9, 10, 11)] == [0, 1, 2, 6, 7, 8]
    one_item = source(name="c", files="b/x.jsonl", columns=COLUMNS | {"group": "answer"})
    index = build(tmp_path, sources[0], one_item, languages=["en", "sw"])
    assert [index.translation(number, 1) for number in (0, 1, 6, 7)] == [3, 4, 9, 9]  # the first of several


def test_rows_without_ids_are_separate_items(tmp_path: Path) -> None:
    for code in ("en", "sw"):
        (tmp_path / code).mkdir()
        write(tmp_path / code / "train.jsonl", [row(item, code) for item in range(3)])
    columns = {key: name for key, name in COLUMNS.items() if key != "id"}
    index = build(tmp_path, source(files="*/train.jsonl", columns=columns), languages=["en", "sw"])
    assert len(set(index.group.tolist())) == 6


BROKEN = '{"id": "b", "lang"'


def test_too_many_bad_rows_name_the_first(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [row(0, "en"), row(1, "en", answer=""), row(2, "xx"), BROKEN, row(3, "en")])
    one = f"{tmp_path}/x.jsonl:2: 'answer' is empty"
    for limit in (0, 2):
        with pytest.raises(DataError) as error:
            build(tmp_path, languages=["en"], max_bad_rows=limit)
        assert str(error.value) == f"{one} (and 2 more); max_bad_rows is {limit}"
    index = build(tmp_path, languages=["en"], max_bad_rows=3)
    assert [origin.rsplit(":")[-1] for origin, _ in index.bad_rows] == ["2", "3", "4"]
    # the row without answer is marked English, the broken one is in an English file; "xx" is neither
    assert index.rows(0).tolist() == [0, 1, 2, 3]
    assert index.bad.tolist() == [False, True, True, False]
    for number in (1, 2):
        with pytest.raises(BadRow):
            index.record(number)
        assert index.translation(number, 0) == -1
    with pytest.raises(DataError, match="and 2 more"):  # a lower limit applies to the cached index too
        build(tmp_path, languages=["en"], max_bad_rows=2)


def test_a_broken_row_keeps_its_place_only_where_its_language_is_known(tmp_path: Path) -> None:
    write(tmp_path / "mixed.jsonl", [row(0, "en"), BROKEN, row(0, "sw")])
    write(tmp_path / "sw.jsonl", [BROKEN, row(1, "sw")])
    index = build(tmp_path, languages=["en", "sw"], max_bad_rows=2)
    assert len(index.bad_rows) == 2
    assert (index.language.tolist(), index.bad.tolist()) == ([0, 1, 1, 1], [False, False, True, False])
    columns = {"prompt": "question", "completion": "answer"}
    constant = source(files="mixed.jsonl", language="sw", columns=columns)
    assert build(tmp_path, constant, languages=["sw"], max_bad_rows=1).bad.tolist() == [False, True, False]
    rows: list[dict[str, Any] | str] = [
        {"q_en": "?", "q_sw": "?", "a": "!"},
        BROKEN,
        {"q_en": 5, "q_sw": "?", "a": "!"},
    ]
    write(tmp_path / "wide.jsonl", rows)
    columns = {"prompt": "q_{language}", "completion": "a"}
    wide = source(files="wide.jsonl", languages=["en", "sw"], columns=columns)
    index = build(tmp_path, wide, languages=["en", "sw"], max_bad_rows=2)  # rows, not their translations, count
    assert index.language.tolist() == [0, 1, 0, 1, 0, 1]
    assert index.bad.tolist() == [False, False, True, True, True, False]


def test_sources_and_languages_without_training_rows_are_refused(parallel: Path) -> None:
    (parallel / "empty.jsonl").write_bytes(b"\n\n")
    (parallel / "header.csv").write_text("id,lang,question,answer\n")
    assert len(build(parallel)) == 110  # an empty file among others is no error
    for files in ("empty.jsonl", "header.csv"):
        with pytest.raises(DataError, match=rf"{files}: source 'none' has no usable rows"):
            build(parallel, source(), source(name="none", files=files))
    with pytest.raises(DataError, match=r"language 'fr' of data.languages has nothing to train on: no source has"):
        build(parallel, languages=[*LANGUAGES, "fr"])
    write(parallel / "few.jsonl", [row("x", "fr")])
    languages = [*LANGUAGES, "fr"]
    with pytest.raises(DataError, match=r"language 'fr' .* nothing to train on: all its items are held out"):
        build(parallel, languages=languages, heldout_items=40)
    with pytest.raises(DataError, match=r"few\.jsonl:1: language 'fr' is not declared; data.languages are en, sw, th"):
        build(parallel, source(files="few.jsonl"))


def test_a_damaged_parquet_file_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    rows = [row(item, "en") for item in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[60:3_000] = bytes(2_940)  # the footer is intact
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read \(") as error:
        build(tmp_path, source(files="x.parquet"), languages=["en"])
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_languages_and_names_of_sources_are_checked(parallel: Path) -> None:
    with pytest.raises(DataError, match=r"source 'items': language 'de' is not declared; data.languages are en, sw"):
        build(parallel, source(response_language="de"))
    with pytest.raises(DataError, match="two sources are named 'items'"):
        build(parallel, source(), source())


def test_a_scan_shows_its_progress(parallel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr("data_pipeline.sources.scan.PROGRESS_ROWS", 2)
    monkeypatch.setattr(Progress, "advance", lambda self, n: shown.append(n))
    rows = [len((parallel / f"{language}.jsonl").read_text().splitlines()) for language in ("en", "sw", "th")]
    build(parallel)
    assert shown == [2] * sum(n // 2 for n in rows)


def test_the_index_is_built_once_and_again_when_a_file_changes(parallel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []
    read = Scan.read
    monkeypatch.setattr(
        Scan, "read", lambda scan, n, reader, shown: scanned.append(reader.shard.name) or read(scan, n, reader, shown)
    )
    first = build(parallel)
    assert scanned == ["en.jsonl", "sw.jsonl", "th.jsonl"]
    assert build(parallel).fingerprint == first.fingerprint
    assert build(parallel, seed=5).fingerprint == first.fingerprint  # nothing is held out: the seed is not used
    assert len(scanned) == 3
    text = (parallel / "sw.jsonl").read_text()
    (parallel / "sw.jsonl").write_text(text.replace("สวัสดี 5", "สวัสดี 6"))  # same size
    os.utime(parallel / "sw.jsonl", ns=(1, 1))
    changed = build(parallel)
    assert len(scanned) == 6
    assert {key for key in first.fingerprint if first.fingerprint[key] != changed.fingerprint[key]} == {"sw.jsonl"}
    with pytest.raises(DataError, match=r"sw\.jsonl:4: the file has changed since the run began"):
        first.record(int(first.rows(1)[3]))


def test_the_fingerprint_depends_on_contents_and_settings_not_on_paths(parallel: Path, tmp_path_factory: Any) -> None:
    moved = tmp_path_factory.mktemp("moved")
    for name in ("en", "sw", "th"):
        (moved / f"{name}.jsonl").write_bytes((parallel / f"{name}.jsonl").read_bytes())
    first = build(parallel).fingerprint
    assert build(moved).fingerprint == first
    other = build(moved, source(columns=COLUMNS | {"system": "answer"})).fingerprint
    assert {key for key in first if first[key] != other[key]} == {"source items"}
    assert {key for key in first if first[key] != build(moved, heldout_items=1).fingerprint[key]} == {"held out"}


def test_a_hub_dataset_that_changes_is_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    (tmp_path / "hub").mkdir()
    hub = source(files=None, hub="hub")
    write(tmp_path / "hub" / "train.jsonl", [row(item, "en") for item in range(3)])
    first = build(tmp_path, hub, languages=["en"])
    os.utime(tmp_path / "hub" / "train.jsonl", ns=(1, 1))
    assert build(tmp_path, hub, languages=["en"]).fingerprint == first.fingerprint
    write(tmp_path / "hub" / "train.jsonl", [row(item, "en") for item in range(2)])
    second = build(tmp_path, hub, languages=["en"])
    assert len(second) == 2
    assert {key for key in first.fingerprint if first.fingerprint[key] != second.fingerprint[key]} == {"hub[train]"}
    check_whole(second)


@pytest.mark.parametrize("name", ["meta.json", "group.npy"])
def test_a_torn_index_is_built_again(parallel: Path, name: str) -> None:
    (folder,) = {path.parent for path in (build(parallel), parallel)[1].glob("cache/*/meta.json")}
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    check_whole(build(parallel))
    assert (folder / name).read_bytes() == whole
    assert [path.name for path in (parallel / "cache").iterdir()] == [folder.name]  # no temporary folder is left


def test_an_index_that_another_process_built_first_is_left_alone(
    parallel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes may have mapped its files already; on a network disk these must not be replaced."""
    files: dict[Path, int] = {}

    def another_process_is_first(scan: Scan) -> Arrays:
        monkeypatch.undo()
        build(parallel)
        files.update({path: path.stat().st_ino for path in (parallel / "cache").rglob("*")})
        return scan.arrays()

    monkeypatch.setattr(Scan, "arrays", another_process_is_first)
    check_whole(build(parallel))
    assert len(files) > 10
    assert {path: path.stat().st_ino for path in (parallel / "cache").rglob("*")} == files


def _build_at_once(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    index = build(folder, source(), source(name="table", files="*.parquet"), heldout_items=3)
    results.put((len(index), index.group.tolist(), index.record(len(index) - 1).id, index.fingerprint))


def test_processes_that_build_at_once_agree(parallel: Path) -> None:
    rows = [row(f"p{item}", code) for code in LANGUAGES for item in range(1500)]
    pq.write_table(pa.Table.from_pylist(rows), parallel / "x.parquet")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_build_at_once, args=(parallel, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert found[0][0] == 110 + 4500
    left = [path.name for path in (parallel / "cache").rglob("*") if "building" in path.name]
    assert left == []


def test_reading_from_threads_and_through_pickle(parallel: Path) -> None:
    (parallel / "x.csv").write_text('id,lang,question,answer\n1,en,"a\nb",c\n2,sw,d,e\n')
    index = build(parallel, source(), source(name="csv", files="x.csv"))
    expected = [index.record(number) for number in range(len(index))]
    data = pickle.dumps(index)
    assert len(data) < 10_000
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(index)), 5)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pickle.loads(data).record, order)) == [expected[number] for number in order]


def test_entries_read_together_equal_single_ones(parallel: Path) -> None:
    """Of several files and formats, in any order, one of them twice, one unusable."""
    (parallel / "x.csv").write_text('id,lang,question,answer\n1,en,"a\nb",c\n2,sw,d,\n3,sw,d,e\n')
    index = build(parallel, source(), source(name="csv", files="x.csv"), max_bad_rows=1)
    (bad,) = np.flatnonzero(index.bad).tolist()
    rows = [*np.random.default_rng(0).permutation(len(index)).tolist(), 3, bad, 3]
    for row, found in zip(rows, index.records(rows), strict=True):
        if row == bad:
            assert str(found) == f"{parallel}/x.csv:4: 'answer' is empty"
        else:
            assert found == index.record(row)
    assert index.records([]) == []


def test_of_entries_read_together_the_unreadable_one_is_named(parallel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(parallel)
    rows = index.rows(1)[:6].tolist()
    expected, torn = index.records(rows), index._place(rows[4])
    read, attempts = JsonLines._bytes_at, []

    def failing(shard: JsonLines, places: list[Place]) -> list[bytes]:
        if torn in places:
            attempts.append(len(places))
            if len(attempts) < fails:
                raise OSError(5, "Input/output error")
        return read(shard, places)

    monkeypatch.setattr(JsonLines, "_bytes_at", failing)
    fails = 99
    message = rf"^{index.origin(rows[4])}: cannot be read \(\[Errno 5\] Input/output error\)$"
    with pytest.raises(DataError, match=message):
        index.records(rows)
    assert attempts == [6, 1], "all together, then one by one"
    attempts.clear()
    fails, index.patience = 3, 60.0
    assert index.records(rows) == expected
    assert attempts == [6, 1, 1], "with patience"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """A 50 MB file is indexed within a few MB of Python's and Arrow's memory; in Parquet it is one row group."""
    questions = [f"{number} " + "x" * 10_000 for number in range(5_000)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(
            pa.table({"question": questions}), path, use_dictionary=False, compression="none", write_batch_size=64
        )
    else:
        line = '{{"question": "{}"}}\n' if kind == "jsonl" else "{}\n"
        path.write_text(("question\n" if kind == "csv" else "") + "".join(map(line.format, questions)))
    assert path.stat().st_size > 50e6
    del questions
    columns = {"prompt": "question", "completion": "question"}
    default_pool = pa.default_memory_pool()
    arrow_pool = pa.proxy_memory_pool(default_pool)
    pa.set_memory_pool(arrow_pool)
    tracemalloc.start()
    try:
        index = build(tmp_path, source(files=f"x.{kind}", language="en", columns=columns), languages=["en"])
        assert index.record(4_999).user_text.startswith("4999 ")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default_pool)
    assert peak + arrow_pool.max_memory() < 12e6
