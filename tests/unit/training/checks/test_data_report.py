"""data_report.py: what `check` reports about epochs, shares, overlong rows and contamination."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import LANGUAGES, PreparedRun, corpus_rows, write_data

from data_pipeline.records import DataError, Split
from data_pipeline.sources.index import build_index
from data_pipeline.text.stage import ChatStage
from training.assembly import DataParts, assemble_data, build_planner, check_longest
from training.checks import data_report
from training.checks.data_report import contamination, mixture_table
from training.config import RunConfig
from training.run_file import validate

Changed = Callable[..., tuple[RunConfig, DataParts]]


@pytest.fixture(scope="module")
def parts(prepared_run: PreparedRun) -> DataParts:
    return assemble_data(prepared_run.config, prepared_run.prepared)


@pytest.fixture
def changed(tmp_path: Path, tiny_run: Any, parts: DataParts) -> Changed:
    """The tiny run with other settings, over the shared corpus or another folder."""

    def make(folder: Path | None = None, **changes: Any) -> tuple[RunConfig, DataParts]:
        config = validate(tiny_run(tmp_path / "run", **changes), "tiny run")
        data, reader = config.data, parts.reader
        assert isinstance(reader.stage, ChatStage)
        index = parts.index
        if folder is not None:
            index = build_index(data.sources, data.languages, folder, tmp_path / "index", seed=config.seed)
        stage = ChatStage(reader.stage.chat, data.sequence_length, data.overlong)
        new = replace(reader, index=index, stage=stage)
        return config, replace(parts, index=index, reader=new, planner=build_planner(data, config.objective, new, None))

    return make


def table(lines: list[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in lines if line.split()[0] in LANGUAGES}


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("warning: ")]


def test_rows_slots_epochs_and_share_of_every_language(changed: Changed) -> None:
    weights = {"strategy": "explicit", "weights": {"en": 5, "de": 2, "sw": 1}}
    config, data = changed(max_steps=30, **{"data.mixture": {**weights, "pairing": "reuse"}})
    lines = list(mixture_table(config.data, config.max_steps, data))
    assert lines[0] == "in 30 steps of 8 slots:"
    assert {language: cells[1:5] for language, cells in table(lines).items()} == {
        "en": ["40", "150", "3.75", "62.5%"], "de": ["40", "60", "1.50", "25.0%"],
        "sw": ["40", "30", "0.75", "12.5%"], "zh": ["40", "0", "0.00", "0.0%"],
    }  # fmt: skip
    slots = [slot for step in range(30) for slot in data.planner.step(step).slots]
    assert data.planner.slots_by_language(30) == [sum(slot.language == n for slot in slots) for n in range(4)]
    assert not warnings(lines)


def test_a_warning_names_languages_whose_rows_repeat_very_often(changed: Changed, tmp_path: Path) -> None:
    """One row fills a quarter of every step, and 40 rows are each read 17 times."""
    folder = write_data(tmp_path / "data")
    (folder / "sw.jsonl").write_text(json.dumps(corpus_rows("sw")[0]) + "\n", encoding="utf-8")
    config, data = changed(folder, max_steps=340)
    found = warnings(list(mixture_table(config.data, config.max_steps, data)))
    assert [line.split(";")[0] for line in found] == [
        "warning: en: each of its 40 rows is read 17 times", "warning: de: each of its 40 rows is read 17 times",
        "warning: sw: its one row is read 2.0 times in every step", "warning: zh: each of its 40 rows is read 17 times",
    ]  # fmt: skip


def test_overlong_rows_are_counted_by_language(changed: Changed) -> None:
    config, data = changed(**{"data.sequence_length": 60})
    lines = list(mixture_table(config.data, config.max_steps, data))
    assert lines[1].endswith("over 60 tokens")
    expected = {}
    for number, language in enumerate(LANGUAGES):
        rows = data.index.rows(number).tolist()
        expected[language] = sum(data.reader.length(row) > 60 for row in rows) / len(rows)
        assert " ".join(table(lines)[language][5:]) == f"{expected[language]:.1%} of 40 rows"
    assert max(expected.values()) > 0
    (warning,) = warnings(lines)
    named = ", ".join(f"{language} {share:.1%}" for language, share in expected.items() if share > 0.01)
    assert warning == (
        f"warning: rows longer than data.sequence_length (60) are left out, their slots stay empty: {named}; "
        "raise data.sequence_length, or set data.overlong=truncate"
    )


def test_overlong_rows_are_counted_in_a_sample_or_in_all_rows(changed: Changed) -> None:
    config, data = changed(**{"data.sequence_length": 60, "data.overlong": "truncate"})
    for line in table(list(mixture_table(config.data, config.max_steps, data, looked_at=7))).values():
        assert " ".join(line[6:]) == "of 7 rows, a sample of 40"
    whole = list(mixture_table(config.data, config.max_steps, data, looked_at=None))
    assert whole == list(mixture_table(config.data, config.max_steps, data, looked_at=40))
    assert "are cut to fit: " in warnings(whole)[0]
    assert warnings(whole)[0].endswith("; raise data.sequence_length")


def test_one_percent_of_overlong_rows_gives_no_warning(changed: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = changed(**{"data.sequence_length": 60})
    monkeypatch.setattr(data_report, "_lengths", lambda *arguments: data_report.Lengths(10, 1000, 5000))
    assert not warnings(list(mixture_table(config.data, config.max_steps, data)))
    monkeypatch.setattr(data_report, "_lengths", lambda *arguments: data_report.Lengths(11, 1000, 5000))
    assert "en 1.1%, de 1.1%" in warnings(list(mixture_table(config.data, config.max_steps, data)))[0]


def test_with_overlong_error_the_longest_rows_are_checked_at_the_start(changed: Changed) -> None:
    config, data = changed(**{"data.sequence_length": 60, "data.overlong": "error"})
    with pytest.raises(DataError, match=r"en\.jsonl:\d+: \d+ tokens, data.sequence_length is 60; shorten the row"):
        check_longest(data.reader)
    with pytest.raises(DataError, match=r"data\.sequence_length is 60"):
        list(mixture_table(config.data, config.max_steps, data))
    config, data = changed(**{"data.overlong": "error"})
    check_longest(data.reader)
    assert not warnings(list(mixture_table(config.data, config.max_steps, data)))


def test_held_out_texts_in_training_are_counted_and_named_by_file_and_line(changed: Changed, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    index = build_index(
        (config := changed()[0]).data.sources, LANGUAGES, folder, tmp_path / "first", heldout_items=10, seed=3
    )
    held = index.rows(2, Split.HELD_OUT).tolist()
    copies = [{**corpus_rows("sw")[int(index.record(row).id[5:])], "id": f"copy-{row}"} for row in held]
    with (folder / "sw.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "question": row["question"].upper()}) + "\n" for row in copies)
    assert list(contamination(index)) == []
    index = build_index(config.data.sources, LANGUAGES, folder, tmp_path / "second", heldout_items=10, seed=3)
    again = index.rows(2, Split.HELD_OUT).tolist()
    texts = {index.record(row).user_text.casefold() for row in index.rows(2).tolist()}
    duplicates = [row for row in again if index.record(row).user_text.casefold() in texts]
    (warning,) = contamination(index)
    assert warning.startswith(f"warning: sw: {len(duplicates)} of {len(again)} held-out texts are also in training")
    first = duplicates[0]
    copy = next(
        row
        for row in index.rows(2).tolist()
        if index.record(row).user_text.casefold() == index.record(first).user_text.casefold()
    )
    assert f"{index.record(first).origin} = {index.record(copy).origin}" in warning
    assert warning.count(" = ") == min(len(duplicates), 3)
    assert (f" and {len(duplicates) - 3} more" in warning) == (len(duplicates) > 3)


def test_the_loaders_threads_give_up_the_interpreters_lock_soon(
    parts: DataParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default after 5 ms, for which the training thread would wait at each of its operations."""
    intervals: list[float] = []
    monkeypatch.setattr("sys.setswitchinterval", intervals.append)
    parts.loader()
    assert intervals == [2e-4]
