"""Translation pairs, checked before a run: none is an error with its cause, two are shown, doubtful ones are logged."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import LANGUAGES, XMIXUP, corpus_rows, run_values, write_task_data

from data_pipeline.order.pairs import _lengths_agree
from data_pipeline.records import DataError
from training.assembly import assemble, assemble_data
from training.check import check_run
from training.checks.pairs import pair_warnings, show_pairs
from training.config import RunConfig
from training.objectives.sft import SFTConfig
from training.run_file import validate
from training.run_folder.prepare import open_index, prepare

NO_ID = [
    {"name": "p", "files": "*.jsonl", "columns": {"language": "language", "prompt": "question", "completion": "answer"}}
]


def written(
    folder: Path, change: Callable[[str, list[dict[str, Any]]], None] | None = None, **changes: Any
) -> RunConfig:
    """The tiny run over rows that `change(language, rows)` has changed."""
    (folder / "data").mkdir()
    for language in LANGUAGES:
        rows: list[dict[str, Any]] = list(corpus_rows(language))
        if change is not None:
            change(language, rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "data" / f"{language}.jsonl").write_text(lines, encoding="utf-8")
    return validate(run_values(folder / "data", folder / "run", **changes), "test")


def with_ids(make: Callable[[str, int, str], str]) -> Callable[[str, list[dict[str, Any]]], None]:
    def change(language: str, rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row["id"] = make(language, number, row["id"])

    return change


def others(make: Callable[[str], str]) -> Callable[[str, list[dict[str, Any]]], None]:
    return with_ids(lambda language, _, name: name if language == "en" else make(name))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            with_ids(lambda language, number, _: str(number + 100 * LANGUAGES.index(language))),
            ("ids look like '0', '1' (en) and '100', '101' (de); no two of them are alike: map columns.id or",),
        ),
        (
            with_ids(lambda language, number, _: f"{language}-{number}"),
            ("'en-0', 'en-1' (en) and 'de-0', 'de-1' (de); they contain the language and would be equal without it",),
        ),
        (others(lambda name: f"\ufeff{name}"), (r"'\ufeffitem-00'", "differ in invisible characters (U+FEFF)")),
        (others(lambda name: f"{name} "), ("'item-00' (", "en.jsonl:1) and 'item-00 ' (", "de.jsonl:1) look alike but "
                                           "differ in white space: make them equal")),
        (others(str.upper), ("differ in upper and lower case",)),
        (others(lambda name: name.replace("-", "_")), ("differ in punctuation",)),
        (others(lambda name: name.replace("i", "ｉ")), ("differ in compatibility forms of characters",)),
        (with_ids(lambda code, number, _: f"{number:0{1 + 3 * (code != 'en')}d}"), ("differ in leading zeros",)),
    ],
    ids=["disjoint", "language", "invisible", "space", "case", "punctuation", "full width", "zeros"],
)  # fmt: skip
def test_no_pairs_at_all_is_refused_with_the_cause(tmp_path: Path, change: Any, parts: tuple[str, ...]) -> None:
    config = written(tmp_path, change)
    with pytest.raises(DataError) as refusal:
        prepare(config)  # what `train` does before it starts a rank
    text = str(refusal.value)
    assert text.startswith(
        "objective 'shifcon' learns from pairs of translations, and there are none: items shared with 'en':"
        " de 0 of 40, sw 0 of 40, zh 0 of 40; ids look like "
    )
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert not (tmp_path / "run" / "tokenizer").exists(), "refused before anything is written"


def test_check_refuses_as_train_does(tmp_path: Path) -> None:
    config = written(tmp_path, **{"data.sources": NO_ID})
    with pytest.raises(
        DataError, match=r"source 'p' maps no id and no group column, so each of its rows is a separate item"
    ):
        list(check_run(config))
    prepare(config.model_copy(update={"objective": SFTConfig(name="sft")}))  # SFT needs no pairs


def test_without_a_contrastive_loss_pairs_are_not_required(tmp_path: Path) -> None:
    config = written(tmp_path, **{"data.sources": NO_ID, "objective.contrastive.weight": 0.0})
    assert list(pair_warnings(config.data, config.objective, prepare(config).index)) == []


def test_unusable_rows_are_not_counted_as_items_or_quoted_in_the_cause(tmp_path: Path) -> None:
    def change(language: str, rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row["id"] = f"{language}-{number}"
        if language == "de":
            rows[0]["answer"] = None

    config = written(tmp_path, change, **{"data.max_bad_rows": 1})
    with pytest.raises(
        DataError, match=r": de 0 of 39, sw 0 of 40, .*'en-0', 'en-1' \(en\) and 'de-1', 'de-2' \(de\);"
    ):
        prepare(config)


def test_ids_in_nfd_match_those_in_nfc(tmp_path: Path) -> None:
    forms = {"en": "NFC", "de": "NFD", "sw": "NFD", "zh": "NFC"}
    config = written(tmp_path, with_ids(lambda language, n, _: unicodedata.normalize(forms[language], f"Größe-é-{n}")))
    index = open_index(config)
    rows = [index.rows(language).tolist() for language in range(4)]
    for language in range(1, 4):
        assert [index.translation(row, 0) for row in rows[language]] == rows[0]
    assert list(pair_warnings(config.data, config.objective, index)) == []


def test_a_language_without_pairs_is_named_in_a_warning(tmp_path: Path) -> None:
    config = written(tmp_path, with_ids(lambda language, _, name: f"x{name}" if language == "sw" else name))
    (line,) = pair_warnings(config.data, config.objective, open_index(config))
    assert line.startswith("language 'sw' has no pairs: none of its 40 items is in 'en' too; ids look like 'item-00', ")


def test_check_shows_two_pairs_and_the_number_of_pairs_per_step(tmp_path: Path) -> None:
    lines = list(check_run(written(tmp_path)))
    place = next(
        n for n, line in enumerate(lines) if line.startswith("pairs a step with 'en', over the first 12 steps: ")
    )
    counts = dict(each.split() for each in lines[place].split(": ")[1].split(", "))
    assert list(counts) == ["de", "sw", "zh"]
    total = float(next(line for line in lines if " pairs a step, in " in line).split(": ")[1].split()[0])
    assert sum(map(float, counts.values())) == pytest.approx(total, abs=0.2)
    shown = lines[place + 1 : place + 7]
    by_language = {
        language: {row["id"]: (n, row) for n, row in enumerate(corpus_rows(language), 1)} for language in LANGUAGES
    }
    seen = []
    for head, *sides in (shown[:3], shown[3:]):
        item = head.removeprefix("--- a pair of item ").strip("'")
        for side in sides:
            number, row = by_language[side[:2]][item]
            assert side == f"{side[:2]}  {tmp_path}/data/{side[:2]}.jsonl:{number}  {item!r}: {row['question']}"
        seen.append([side[:2] for side in sides])
    assert [dominant for dominant, _ in seen] == ["en", "en"]
    assert len({other for _, other in seen}) == 2, "of two languages"
    assert not [line for line in lines if "warning" in line]


def test_the_two_pairs_are_of_two_languages_even_if_one_has_most_slots(tmp_path: Path) -> None:
    mixture = {"strategy": "explicit", "weights": {"en": 16, "de": 14, "sw": 1, "zh": 1}, "pairing": "reuse"}
    changes = {"data.mixture": mixture, "data.slots_per_step": 32, "data.micro_batch_tokens": 768}
    config = written(tmp_path, **changes)
    data = assemble_data(config, prepare(config))
    lines = list(show_pairs(config.data, config.objective, config.max_steps, data.index, data.planner))
    heads = [n for n, line in enumerate(lines) if line.startswith("--- a pair of item ")]
    assert [lines[n + 1][:2] for n in heads] == ["en", "en"]
    assert len({lines[n + 2][:2] for n in heads}) == 2


def other_lengths(language: str, rows: list[dict[str, Any]]) -> None:
    draw = random.Random(language)
    for number, row in enumerate(rows):
        row["question"] = f"{number} " + "x" * draw.randint(1, 40)


def other_numbers(language: str, rows: list[dict[str, Any]]) -> None:
    draw = random.Random(language)
    for number, row in enumerate(rows):
        row["question"] = f"{draw.randint(10**8, 10**9 - 1)} " + "x" * (number + 1)


@pytest.mark.parametrize("change", [other_lengths, other_numbers])
def test_pairs_that_agree_in_numbers_or_in_lengths_give_no_warning(tmp_path: Path, change: Any) -> None:
    config = written(tmp_path, change)
    assert list(pair_warnings(config.data, config.objective, open_index(config))) == []


def shuffled(language: str, rows: list[dict[str, Any]]) -> None:
    random.Random(language).shuffle(rows)
    for number, row in enumerate(rows):
        row["id"] = str(number)


def test_ids_that_restart_in_every_file_give_a_warning(tmp_path: Path) -> None:
    """Unrelated rows share an id: neither numbers nor lengths of the texts agree more than by chance."""
    config = written(tmp_path, shuffled)
    found = list(pair_warnings(config.data, config.objective, open_index(config)))
    assert [line.split(":")[0] for line in found] == [
        f"the pairs of {language!r} and 'en' do not look like translations" for language in ("de", "sw", "zh")
    ]
    assert all("numbers agree in " in line and "rank correlation " in line for line in found)


def test_a_run_logs_the_warnings_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = written(tmp_path, shuffled)
    prepared = prepare(config)
    monkeypatch.setattr("training.assembly.deepspeed_settings", stopped)
    with pytest.raises(InterruptedError):
        assemble(config, prepared)
    assert caplog.messages == list(pair_warnings(config.data, config.objective, prepared.index))
    assert len(caplog.messages) == 3


def stopped(*_: Any, **__: Any) -> None:
    """Replaces everything after the data is assembled."""
    raise InterruptedError


def test_an_id_shared_by_two_texts_of_a_language_gives_a_warning(tmp_path: Path) -> None:
    config = written(tmp_path, with_ids(lambda language, number, name: "item-00" if number == 7 else name))
    found = [
        line
        for line in pair_warnings(config.data, config.objective, open_index(config))
        if "is shared by different texts" in line
    ]
    assert len(found) == 4
    file = tmp_path / "data" / "en.jsonl"
    assert found[0].startswith(
        f"id 'item-00' is shared by different texts in 'en': {file}:1 and {file}:8; ids that restart"
    )


def test_duplicate_rows_and_rows_of_one_group_are_not_repeated_ids(tmp_path: Path) -> None:
    def twice(language: str, rows: list[dict[str, Any]]) -> None:
        rows.append(rows[0])
        for row in rows:
            row["item"] = "all" if row["id"] in ("item-03", "item-04") else row["id"]

    columns = {"id": "id", "language": "language", "prompt": "question", "completion": "answer"}
    for name, more in (("a", {}), ("b", {"group": "item"})):
        (tmp_path / name).mkdir()
        sources = [{"name": "p", "files": "*.jsonl", "columns": columns | more}]
        config = written(tmp_path / name, twice, **{"data.sources": sources})
        assert not [
            line
            for line in pair_warnings(config.data, config.objective, open_index(config))
            if "different texts" in line
        ]


def task_run(folder: Path, change: Callable[[str, dict[str, Any]], None], **changes: Any) -> RunConfig:
    data = write_task_data(folder / "data")
    for file in data.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            change(file.stem, row)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = {"vocab_size": 120, "style": "encoder"}
    return validate(run_values(data, folder / "run", **{**XMIXUP, "tokenizer.train": tokenizer, **changes}), "test")


GOLD_ONLY = [
    {"name": "questions", "files": "*.jsonl", "columns": {name: name for name in ("id", "language", "words", "tags")}}
]


def own_ids(language: str, row: dict[str, Any]) -> None:
    row["id"] = f"{language}:{row['id']}"


def test_xmixup_without_gold_or_back_translations_is_refused(tmp_path: Path) -> None:
    config = task_run(tmp_path, own_ids, **{"data.sources": GOLD_ONLY})
    with pytest.raises(
        DataError, match=r"^objective 'xmixup' learns from pairs .* they contain the language and would be"
    ):
        prepare(config)
    english = {"data.languages": ["en"], "data.sources": [{**GOLD_ONLY[0], "files": "en.jsonl"}]}
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"^objective 'xmixup' learns from pairs .*: 'en' is the only language$"):
        prepare(task_run(tmp_path / "a", own_ids, **english))


def test_xmixup_pairs_from_back_translations_are_counted_and_shown(tmp_path: Path) -> None:
    def change(language: str, row: dict[str, Any]) -> None:
        own_ids(language, row)
        if language == "sw":
            row["back_words"] = None

    config = task_run(tmp_path, change)
    prepared = prepare(config)
    (line,) = pair_warnings(config.data, config.objective, prepared.index)
    assert line.startswith("language 'sw' has no pairs: ")
    lines = list(check_run(config))
    place = next(n for n, line in enumerate(lines) if line.startswith("pairs a step with 'en', over the first "))
    assert "de 8.0, sw 0.0, zh 8.0" in lines[place]
    assert lines[place + 1].startswith("--- a pair of item '")
    assert lines[place + 2].startswith("back-translation  ")
    assert f"warning: {line}" in lines
    assemble_data(config, prepared)


@pytest.mark.parametrize(("noise", "correlation", "agrees"), [(38, "0.48", True), (50, "0.35", False)])
def test_length_correlation_of_a_few_short_texts_is_tested_against_chance(
    noise: int, correlation: str, agrees: bool
) -> None:
    """32 pairs of texts of similar length: a correlation of 0.48 is significant (p = 0.004), 0.35 is not (0.026)."""
    rng = random.Random(1)
    lengths = [40 + number for number in range(32)]
    texts, others = (
        ["x" * length for length in each] for each in (lengths, [n + rng.randrange(noise) for n in lengths])
    )
    found = _lengths_agree(texts, others)
    assert found is not None
    assert found == (agrees, f"text lengths do not correlate (rank correlation {correlation} over 32 pairs)")
