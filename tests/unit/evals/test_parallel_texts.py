"""Sentences are matched with their translations by group, by row or by line; mismatches are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.records import DataError
from evals.errors import EvalError
from evals.parallel_texts import parallel_texts, text_files


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def rows(language: str, *groups: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"{language}{g}", "group": g, "language": language, "text": f"{language} {g}", **more} for g in groups
    ]


def test_groups_join_each_language_on_its_own_subset(tmp_path: Path) -> None:
    write(tmp_path / "en.jsonl", rows("en", "1", "2", "3", "4"))
    write(tmp_path / "de.jsonl", rows("de", "3", "1", "7"))
    write(tmp_path / "sw.jsonl", rows("sw", "4", "2"))
    files = text_files(tmp_path)
    assert list(files) == ["de", "en", "sw"]
    found = parallel_texts(files, "en")
    assert found == {"de": (["en 1", "en 3"], ["de 1", "de 3"]), "sw": (["en 2", "en 4"], ["sw 2", "sw 4"])}
    assert parallel_texts(files, "en", limit=1)["sw"] == (["en 2"], ["sw 2"])
    assert parallel_texts(text_files(tmp_path, ["en", "sw"]), "en").keys() == {"sw"}
    assert parallel_texts(text_files(tmp_path, ["en", "de"]), "de")["en"] == (["de 3", "de 1"], ["en 3", "en 1"])


def test_the_first_text_of_each_kind_of_row_is_its_sentence(tmp_path: Path) -> None:
    def of(prefix: str) -> list[dict[str, Any]]:
        return [
            {"group": "a", "text_a": f"{prefix} premise", "text_b": "one"},
            {"group": "b", "text_a": f"{prefix} premise", "text_b": "another"},  # the sentence of group a again
            {"group": "c", "question": f"{prefix} question?", "context": "long"},
            {"group": "d", "words": [prefix, "words", "."]},
            {"group": "e", "words": ["not", "these"], "text": f" {prefix} sentence "},
        ]

    write(tmp_path / "en.jsonl", of("en"))
    write(tmp_path / "de.jsonl", of("de"))
    own, translated = parallel_texts(text_files(tmp_path), "en")["de"]
    assert own == ["en premise", "en question?", "en words .", "en sentence"]
    assert translated == ["de premise", "de question?", "de words .", "de sentence"]


def test_rows_with_their_translation_need_no_other_file(tmp_path: Path) -> None:
    write(tmp_path / "de.jsonl", rows("de", "1", "2", translation="english"))
    assert parallel_texts(text_files(tmp_path), "en") == {"de": (["english"] * 2, ["de 1", "de 2"])}
    with pytest.raises(EvalError, match=r"de\.jsonl:1: is translated into English; every row needs .* into 'fr'"):
        parallel_texts(text_files(tmp_path), "fr")
    write(tmp_path / "de.jsonl", rows("de", "1", translation="english") + rows("de", "2"))
    with pytest.raises(EvalError, match=r"de\.jsonl:2: has no translation, but others do"):
        parallel_texts(text_files(tmp_path), "en")


def test_tatoeba_files_are_paired_by_line(tmp_path: Path) -> None:
    for code, lines in {"deu": ["Ja.", "Nein."], "swh": ["Ndiyo."]}.items():
        (tmp_path / f"tatoeba.{code}-eng.{code}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        english = "".join(f"{code} {number}\n" for number, _ in enumerate(lines))
        (tmp_path / f"tatoeba.{code}-eng.eng").write_text(english, encoding="utf-8")
    files = text_files(tmp_path)
    assert parallel_texts(files, "en") == {"de": (["deu 0", "deu 1"], ["Ja.", "Nein."]), "sw": (["swh 0"], ["Ndiyo."])}
    with pytest.raises(EvalError, match="neither JSON lines nor Tatoeba's pairs with English, so not parallel to 'fr'"):
        parallel_texts(files, "fr")
    (tmp_path / "tatoeba.swh-eng.eng").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(
        EvalError, match=r"swh-eng\.eng: 2 sentences, but .*swh-eng\.swh has 1; they must have the same number"
    ):
        parallel_texts(files, "en")


def test_folders_without_parallel_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no parallel texts there; files are XX\.jsonl"):
        text_files(tmp_path)
    (tmp_path / "de-en.en").write_text("a\nb\n")  # sorted: its lines do not match those of de-en.de
    with pytest.raises(EvalError, match="have their English side sorted, so lines do not match"):
        text_files(tmp_path)
    write(tmp_path / "de.jsonl", rows("de", "1"))
    with pytest.raises(EvalError, match="no file for 'fr'; there are de"):
        text_files(tmp_path, ["de", "fr"])
    with pytest.raises(EvalError, match=r"en\.jsonl: missing; de\.jsonl is joined with it by `group`"):
        parallel_texts(text_files(tmp_path), "en")
    with pytest.raises(EvalError, match="only texts in 'de'"):
        parallel_texts(text_files(tmp_path), "de")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (rows("de", "1", "8", "1"), r"de\.jsonl:3: group '1' is at .*de\.jsonl:1 too; each item has one row"),
        (rows("de", "8", "9"), r"de\.jsonl: shares no `group` with the rows in 'en'"),
        ([], r"de\.jsonl: shares no `group`"),
        ([{"id": "1", "text": "a"}], r"de\.jsonl:1: no `group`, which identifies the item it translates"),
        (rows("de", "1") + rows("en", "2"), r"de\.jsonl:2: language 'en' in a file of 'de'"),
        ([{"group": "1", "text": ""}], r"de\.jsonl:1: no text; a row has one of text_a, question, text, words"),
        ([{"group": "1", "text": "  "}], r"de\.jsonl:1: `text` or `translation` is not text, but '  '"),
        ([{"group": "1", "text": 7}], r"de\.jsonl:1: `text` or `translation` is not text, but '7'"),
    ],
)
def test_rows_that_are_not_parallel_are_named(tmp_path: Path, bad: list[dict[str, Any]], message: str) -> None:
    write(tmp_path / "en.jsonl", rows("en", "1", "2"))
    write(tmp_path / "de.jsonl", bad)
    with pytest.raises(EvalError, match=message) as caught:
        parallel_texts(text_files(tmp_path), "en")
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    write(tmp_path / "en.jsonl", rows("en", "1"))
    (tmp_path / "de.jsonl").write_text('{"group": "1", "text"\n')
    with pytest.raises(DataError, match=r"de\.jsonl:1: not valid JSON"):
        parallel_texts(text_files(tmp_path), "en")
