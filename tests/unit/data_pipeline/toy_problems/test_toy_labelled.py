"""The labelled toy task: parallel rows, balanced classes, no leakage, translations with the requested noise."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.records import DataError
from data_pipeline.tasks.rows import read_task_file
from data_pipeline.toy_problems.corpus import LANGUAGES, render
from data_pipeline.toy_problems.labelled import (
    CLASSES,
    LABELLED,
    LABELS,
    UNSEEN,
    LabelledSizes,
    Split,
    drop_words,
    label_of,
    labelled_items,
    wordings,
    write_labelled_task,
)
from data_pipeline.toy_problems.structures import STRUCTURES

SPLITS: tuple[Split, ...] = ("text", *LABELLED)
OTHERS = LANGUAGES[1:]
TEXT = {language: 900 if language == "en" else 150 for language in LANGUAGES}
SIZES = LabelledSizes(n_train=140, n_dev=73, n_test_seen=140, n_test_unseen=140, n_text=TEXT, noise=0.2)
SEED = 3
UNSPACED = {"zh", "ja", "th"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "task"
    write_labelled_task(folder, SIZES, SEED)
    return folder


@pytest.fixture(scope="module")
def noiseless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same items, with translations without noise."""
    folder = tmp_path_factory.mktemp("labelled") / "noiseless"
    write_labelled_task(folder, replace(SIZES, noise=0.0), SEED)
    return folder


def rows(task: Path, split: str, language: str) -> list[Row]:
    text = (task / split / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def structure_of(row: Row) -> str:
    return str(row["group"].split("-")[0])


def combination(row: Row, split: str) -> tuple[str, ...]:
    """(structure, stated numbers), from the group alone: without the name's number and, in `text`, the wording's."""
    return tuple(row["group"].split("-")[: -2 if split == "text" else -1])


def words_of(text: str, language: str) -> list[str]:
    """The words that may be dropped, found by patterns and not by the code under test."""
    if language in UNSPACED:
        return [letter for letter in text if unicodedata.category(letter) in ("Lo", "Lm")]
    return [word for word in re.findall(r"\S+", text) if not re.search(r"\d", word)]


def is_part(shorter: list[str] | str, longer: list[str] | str) -> bool:
    """In the same order, with gaps."""
    rest = iter(longer)
    return all(each in rest for each in shorter)


# --- the classes


def test_every_structure_has_one_class() -> None:
    assert Counter(member for members in CLASSES.values() for member in members) == Counter(
        structure.id for structure in STRUCTURES
    )
    assert tuple(CLASSES) == LABELS
    assert [label_of(structure) for structure in STRUCTURES if structure.id == "cyclist_speed"] == ["rate"]


def test_every_class_has_seen_situations_and_one_held_out() -> None:
    assert 5 <= len(LABELS) <= 8
    for members in CLASSES.values():
        assert len(members) >= 4
        assert len(set(members) & UNSEEN) >= 1
        assert len(set(members) - UNSEEN) >= 3
    assert {structure.id for structure in STRUCTURES if structure.held_out} < UNSEEN


def test_operations_agree_with_classes() -> None:
    """Each class but `two_steps` has one operation; two classes may share it, so numbers do not show the class."""
    workings = {label: {s.operation.working for s in STRUCTURES if label_of(s) == label} for label in LABELS}
    assert all(len(found) == 1 for label, found in workings.items() if label != "two_steps")
    assert all(working.count("=") == 2 for working in workings["two_steps"])
    assert workings["groups"] == workings["repeated"]
    assert workings["share"] == workings["rate"]


# --- the rows


def test_files_and_sizes_are_as_requested(task: Path) -> None:
    files = {str(file.relative_to(task)) for file in task.rglob("*") if file.is_file()}
    assert files == {f"{split}/{language}.jsonl" for split in SPLITS for language in LANGUAGES}
    for language in LANGUAGES:
        assert len(rows(task, "text", language)) == TEXT[language]
        for split in LABELLED:
            assert len(rows(task, split, language)) == getattr(SIZES, f"n_{split}")


def test_rows_are_canonical(task: Path) -> None:
    for language in LANGUAGES:
        for row in rows(task, "text", language):
            assert list(row) == ["id", "group", "language", "text"]
            assert row["language"] == language
            assert row["text"].strip() == row["text"] != ""
        for split in LABELLED:
            for row in rows(task, split, language):
                assert list(row)[:5] == ["id", "group", "language", "text_a", "label"]
                assert list(row)[5:] == ([] if language == "en" else ["back_text_a"])
                assert row["language"] == language
                assert row["label"] in LABELS
                assert all(isinstance(value, str) and value for value in row.values())


@pytest.mark.parametrize("split", LABELLED)
def test_the_task_reader_reads_every_row(task: Path, split: Split) -> None:
    for language in LANGUAGES:
        records = list(read_task_file(task / split / f"{language}.jsonl", "classification"))
        for record, row in zip(records, rows(task, split, language), strict=True):
            assert (record.group, record.language, record.example.label) == (row["group"], language, row["label"])
            back = None if record.back is None else record.back.texts
            assert back == (None if language == "en" else (row["back_text_a"],))


def test_the_reader_of_text_reads_the_sentences(task: Path) -> None:
    for language in LANGUAGES:
        records = read_task_file(task / "text" / f"{language}.jsonl", "text")
        assert [record.texts[0] for record in records] == [row["text"] for row in rows(task, "text", language)]


def test_an_item_is_the_same_in_every_language(task: Path) -> None:
    for split in SPLITS:
        english = rows(task, split, "en")
        assert len({row["group"] for row in english}) == len(english), "no item twice"
        for language in LANGUAGES:
            theirs = rows(task, split, language)
            assert len({row["id"] for row in theirs}) == len(theirs)
            for row, same in zip(theirs, english, strict=split != "text"):
                assert row["group"] == same["group"]
                assert row.get("label") == same.get("label")
                numbers = [
                    sorted(re.findall(r"\d+", text)) for key, text in row.items() if "text" in key
                ]  # of both sides
                assert all(found == sorted(combination(row, split)[1:]) for found in numbers), row


def test_ids_are_unique_over_all_files(task: Path) -> None:
    ids = Counter(row["id"] for split in SPLITS for language in LANGUAGES for row in rows(task, split, language))
    assert ids.most_common(1)[0][1] == 1


@pytest.mark.parametrize("split", LABELLED)
def test_classes_differ_by_one_item_at_most(task: Path, split: Split) -> None:
    counts = Counter(row["label"] for row in rows(task, split, "en"))
    assert set(counts) == set(LABELS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_labels_are_those_of_the_situations(task: Path) -> None:
    for split in LABELLED:
        for row in rows(task, split, "en"):
            assert structure_of(row) in CLASSES[row["label"]]
    assert {structure_of(row) for row in rows(task, "train", "en")} == {s.id for s in STRUCTURES} - UNSEEN
    assert {structure_of(row) for row in rows(task, "test_seen", "en")} == {s.id for s in STRUCTURES} - UNSEEN
    assert {structure_of(row) for row in rows(task, "test_unseen", "en")} == UNSEEN


# --- leakage


def test_no_combination_of_situation_and_numbers_is_in_two_folders(task: Path) -> None:
    where: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for split in SPLITS:
        for language in LANGUAGES:
            for row in rows(task, split, language):
                where[combination(row, split)].add(split)
    assert not {key: splits for key, splits in where.items() if len(splits) > 1}


def test_the_folders_divide_all_combinations_between_them() -> None:
    """Not only the rows that small sizes happen to draw."""
    most: dict[Split, int] = {"train": 1100, "dev": 350, "test_seen": 590}
    drawn = {split: {item.id.rsplit("-", 1)[0] for item in labelled_items(split, n, SEED)} for split, n in most.items()}
    assert not drawn["train"] & drawn["dev"]
    assert not drawn["train"] & drawn["test_seen"]
    assert not drawn["dev"] & drawn["test_seen"]


def test_no_text_is_in_two_folders(task: Path) -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        for language in LANGUAGES:
            for row in rows(task, split, language):
                for key in ("text", "text_a", "back_text_a"):
                    where[row.get(key, "")].add(split)
    del where[""]
    assert not {text: splits for text, splits in where.items() if len(splits) > 1}


def test_unseen_situations_have_no_labels_elsewhere(task: Path) -> None:
    for split in ("train", "dev", "test_seen"):
        for language in LANGUAGES:
            assert not {structure_of(row) for row in rows(task, split, language)} & UNSEEN
    assert {structure_of(row) for row in rows(task, "text", "en")} > UNSEEN, "their words occur without labels"


def template_of(text: str) -> str:
    """A sentence with numbers and names taken out."""
    return re.sub(r"\b(Anna|Omar|Lina|Tom|Maria|David|Sara|Ivan)\b", "N", re.sub(r"\d+", "#", text))


def test_dev_and_seen_tests_use_wordings_that_are_not_in_training(noiseless: Path) -> None:
    trained = {template_of(row["text_a"]) for row in rows(noiseless, "train", "en")}
    trained |= {template_of(row["back_text_a"]) for row in rows(noiseless, "train", "de")}
    assert len(trained) == 2 * (len(STRUCTURES) - len(UNSEEN)), "two wordings of each situation"
    for split in ("dev", "test_seen"):
        for row in rows(noiseless, split, "en"):
            assert template_of(row["text_a"]) not in trained
        for row in rows(noiseless, split, "sw"):
            assert template_of(row["back_text_a"]) not in trained


# --- translations


def test_originals_and_translations_share_wordings_only_in_dev_and_seen_tests() -> None:
    for split in LABELLED:
        pairs = defaultdict(set)
        for item in labelled_items(split, 140, SEED):
            written, translated = wordings(item, split, SEED)
            pairs[item.structure.id].add((written, translated))
            assert (written == translated) == (split in ("dev", "test_seen"))
        for found in pairs.values():
            used = {wording for pair in found for wording in pair}
            assert len(used) <= {"train": 2, "test_unseen": 3}.get(split, 1)
    assert {wordings(item, "test_unseen", SEED)[0] for item in labelled_items("test_unseen", 140, SEED)} == {0, 1, 2}


@pytest.mark.parametrize("split", LABELLED)
def test_without_noise_every_side_is_the_item_in_its_wording(noiseless: Path, split: Split) -> None:
    items = labelled_items(split, getattr(SIZES, f"n_{split}"), SEED)
    for language in LANGUAGES:
        for item, row in zip(items, rows(noiseless, split, language), strict=True):
            written, translated = wordings(item, split, SEED)
            machine = split == "train" and language != "en"
            assert row["text_a"] == render(item, language, translated if machine else written)[0]
            if language != "en":
                assert row["back_text_a"] == render(item, "en", translated)[0]


def test_a_round_trip_in_training_differs_from_the_original(noiseless: Path) -> None:
    english = {row["group"]: row["text_a"] for row in rows(noiseless, "train", "en")}
    for language in OTHERS:
        assert all(row["back_text_a"] != english[row["group"]] for row in rows(noiseless, "train", language))


def test_originals_lose_no_words(task: Path, noiseless: Path) -> None:
    for split in SPLITS:
        for language in LANGUAGES:
            if split == "train" and language != "en":
                continue
            key = "text" if split == "text" else "text_a"
            for row, whole in zip(rows(task, split, language), rows(noiseless, split, language), strict=True):
                assert row[key] == whole[key]


@pytest.mark.parametrize("language", OTHERS)
@pytest.mark.parametrize(
    ("split", "key"), [("train", "text_a"), ("train", "back_text_a"), ("test_seen", "back_text_a")]
)
def test_translations_lose_the_requested_share_of_words(
    task: Path, noiseless: Path, language: str, split: str, key: str
) -> None:
    """Within four standard deviations of a binomial count; the remaining words keep their order."""
    of = "en" if key == "back_text_a" else language
    kept = total = 0
    for row, whole in zip(rows(task, split, language), rows(noiseless, split, language), strict=True):
        assert is_part(row[key], whole[key])
        assert re.findall(r"\d+", row[key]) == re.findall(r"\d+", whole[key]), "numbers survive"
        kept += len(words_of(row[key], of))
        total += len(words_of(whole[key], of))
    share = SIZES.noise / 2 if of in UNSPACED else SIZES.noise
    bound = 4 * (share * (1 - share) / total) ** 0.5
    assert bound < 0.04
    assert (total - kept) / total == pytest.approx(share, abs=bound)


def test_translations_into_english_differ_between_languages(task: Path) -> None:
    german, swahili = (rows(task, "train", language) for language in ("de", "sw"))
    differ = sum(a["back_text_a"] != b["back_text_a"] for a, b in zip(german, swahili, strict=True))
    assert differ > len(german) / 2


def test_dropping_words_keeps_numbers_marks_and_units() -> None:
    almost_all = 1 - 1e-9
    assert drop_words("Anna buys 5 pears. How many?", "en", almost_all, "key") == "5"
    assert drop_words("{}টি আপেল".replace("{}", "7"), "bn", almost_all, "key") == "7টি"
    assert drop_words("Anna buys 5 pears.", "en", 0.0, "key") == "Anna buys 5 pears."
    thai = "เดินวันเสาร์ 7 กิโลเมตร ที่ป้าย"
    for key in range(50):
        left = drop_words(thai, "th", 0.6, key)
        assert left == drop_words(thai, "th", 0.6, key)
        for before, mark in zip(" " + left, left, strict=False):  # no combining mark has lost its letter
            if unicodedata.category(mark) == "Mn":
                assert before + mark in thai
    chinese = "走了5km，又走了"
    for key in range(50):
        assert "5km" in drop_words(chinese, "zh", almost_all, key)
        assert "，" in drop_words(chinese, "zh", almost_all, key)


# --- writing


def test_the_seed_determines_every_byte(task: Path, tmp_path: Path) -> None:
    write_labelled_task(tmp_path / "again", SIZES, SEED)
    write_labelled_task(tmp_path / "other", SIZES, SEED + 1)
    files = [file.relative_to(task) for file in task.rglob("*") if file.is_file()]
    for file in files:
        content = (task / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == content
        assert (tmp_path / "other" / file).read_bytes() != content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"], "no temporary folder is left"


def test_a_smaller_size_gives_the_first_items_of_a_larger_one(task: Path, tmp_path: Path) -> None:
    """A smaller size is a part of a larger one, also of the text of a language."""
    write_labelled_task(tmp_path / "small", replace(SIZES, n_train=40, n_text={"en": 100, "th": 30}), SEED)
    for split, language, n in (
        ("train", "th", 40),
        ("text", "en", 100),
        ("text", "th", 30),
        ("dev", "de", SIZES.n_dev),
    ):
        assert rows(tmp_path / "small", split, language) == rows(task, split, language)[:n]
    assert sorted(file.name for file in (tmp_path / "small" / "text").iterdir()) == ["en.jsonl", "th.jsonl"]


def test_the_default_sizes_are_available() -> None:
    sizes = LabelledSizes()
    for split in LABELLED:
        n = getattr(sizes, f"n_{split}")
        assert len({item.id for item in labelled_items(split, n, 0)}) == n
    assert list(sizes.n_text) == list(LANGUAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_dev": 100_000}, r"^labelled toy task: 100000 items requested from dev, which has \d+ in equal classes$"),
        ({"n_text": {"sw": 10**6}}, r"^labelled toy task: 1000000 sentences requested from text/sw, which has \d+$"),
        ({"n_text": {"xx": 5}}, r"^n_text: no language 'xx' in the toy problems; there are en, de, "),
        ({"n_train": -1}, r"^labelled toy task: -1 requested of train; give 0 or more$"),
        ({"n_text": {"sw": -1}}, r"^labelled toy task: -1 requested of text/sw; give 0 or more$"),
        ({"noise": 1.0}, r"^noise: 1.0 is not a share; give one from 0 to less than 1$"),
        ({"noise": -0.1}, r"^noise: -0.1 is not"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_labelled_task(tmp_path / "task", replace(SIZES, **change), SEED)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    with pytest.raises(DataError, match=r"task: exists already; give a new folder$"):
        write_labelled_task(tmp_path / "task", SIZES, SEED)
    assert not list((tmp_path / "task").iterdir())


def test_an_interrupted_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        write_labelled_task(tmp_path / "task", SIZES, SEED)
    assert not list(tmp_path.iterdir())
