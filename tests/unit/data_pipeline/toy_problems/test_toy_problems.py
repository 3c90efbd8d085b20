"""The toy corpus: complete phrasings in ten languages, correct computations, and splits without leakage."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.records import DataError
from data_pipeline.toy_problems.corpus import (
    LANGUAGES,
    SHARES,
    CorpusSizes,
    Split,
    ToyItem,
    items_of,
    phrasings,
    render,
    split_of,
    write_corpus,
)
from data_pipeline.toy_problems.structures import STRUCTURES, Structure

SPLITS: tuple[Split, ...] = ("base", "finetune", "test_seen", "test_unseen")
SIZES = CorpusSizes(english_base=400, other_base=60, finetune=300, test_seen=120, test_unseen=120)
SEED = 5
SCRIPTS = {
    "en": {"LATIN"}, "de": {"LATIN"}, "es": {"LATIN"}, "fr": {"LATIN"}, "sw": {"LATIN"},
    "ru": {"CYRILLIC"}, "zh": {"CJK"}, "ja": {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"},
    "th": {"THAI"}, "bn": {"BENGALI"},
}  # fmt: skip
UNITS = {"kg", "km", "m"}  # written in Latin letters in any script
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}

Row = dict[str, Any]


def fields_of(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def scripts_of(text: str) -> set[str]:
    """Scripts of a text's letters and marks, by the first word of their Unicode names."""
    for unit in UNITS:
        text = re.sub(rf"(?<![A-Za-z]){unit}(?![A-Za-z])", "", text)
    return {unicodedata.name(letter).split()[0] for letter in text if unicodedata.category(letter)[0] in "LM"}


def numbers_in(text: str) -> list[int]:
    """In whatever digits they are written."""
    return [int(number) for number in re.findall(r"\d+", text)]


def an_item(structure: Structure) -> ToyItem:
    """The middle one of a structure's number sets."""
    draws = list(structure.draws())
    return ToyItem(structure, draws[len(draws) // 2], 3 if structure.named else 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("toy")
    write_corpus(output, SIZES, SEED)
    return output


def rows(corpus: Path, split: str, language: str) -> list[Row]:
    text = (corpus / split / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def all_rows(corpus: Path) -> Iterator[tuple[str, str, Row]]:
    for split in SPLITS:
        for language in LANGUAGES:
            for row in rows(corpus, split, language):
                yield split, language, row


def combination(row: Row) -> tuple[str, ...]:
    """(structure, stated numbers) of a row, from its id alone: all but the name's number at the end."""
    return tuple(row["id"].split("-")[:-1])


# --- the phrasings


def test_held_out_situations_use_operations_of_seen_ones() -> None:
    assert len({structure.id for structure in STRUCTURES}) == len(STRUCTURES)
    learnt = {structure.operation.working for structure in STRUCTURES if not structure.held_out}
    assert {structure.operation.working for structure in STRUCTURES if structure.held_out} <= learnt


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_structure_has_three_different_phrasings(language: str) -> None:
    questions = phrasings(language)["structures"]
    assert set(questions) == {structure.id for structure in STRUCTURES}
    for structure, templates in questions.items():
        assert len(templates) == len(set(templates)) == 3, structure
    assert len({template for templates in questions.values() for template in templates}) == 3 * len(STRUCTURES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_phrasing_has_exactly_its_placeholders(language: str) -> None:
    for structure in STRUCTURES:
        for template in phrasings(language)["structures"][structure.id]:
            numbers = [field for field in fields_of(template) if field != "name"]
            assert sorted(numbers) == sorted(structure.operation.placeholders), template
            assert set(fields_of(template)) == structure.placeholders, template
            assert not re.search(r"\d", template), f"a number beside the placeholders: {template}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answer_ends_with_the_result(language: str) -> None:
    assert fields_of(phrasings(language)["answer"]) == ["working", "result"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_as_many_distinct_names_as_english(language: str) -> None:
    names = phrasings(language)["names"]
    assert len(names) == len(set(names)) == len(phrasings("en")["names"]) > 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_everything_is_written_in_the_script_of_the_language(language: str) -> None:
    words = phrasings(language)
    for name in words["names"]:
        assert scripts_of(name) <= SCRIPTS[language]
    for item in map(an_item, STRUCTURES):
        for phrasing in range(3):
            question, answer = render(item, language, phrasing)
            assert scripts_of(question) <= SCRIPTS[language], question
            assert scripts_of(answer) <= SCRIPTS[language], answer
            assert language != "ja" or "HIRAGANA" in scripts_of(question), f"not Japanese: {question}"


def test_no_language_repeats_texts_of_another() -> None:
    texts = Counter(
        template for language in LANGUAGES for each in phrasings(language)["structures"].values() for template in each
    )
    assert texts.most_common(1)[0][1] == 1
    assert len({phrasings(language)["answer"] for language in LANGUAGES}) == len(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_rendering_leaves_no_brace_and_states_each_number_once(language: str) -> None:
    for item in map(an_item, STRUCTURES):
        stated = sorted(item.numbers[key] for key in item.structure.operation.placeholders)
        for phrasing in range(3):
            question, answer = render(item, language, phrasing)
            assert not set("{}") & set(question + answer), question
            assert sorted(numbers_in(question)) == stated, question
            name = phrasings(language)["names"][item.name]
            assert (name in question) == item.structure.named, question


# --- the computations


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.id)
def test_every_computation_is_correct_and_ends_in_the_result(structure: Structure) -> None:
    """All number sets of a structure: each operand was stated or is the result of the equation before."""
    for numbers in structure.draws():
        _, answer = render(ToyItem(structure, numbers, 0), "en", 0)
        equations = EQUATION.findall(answer)
        known = [numbers[key] for key in structure.operation.placeholders]
        for left, sign, right, result in equations:
            assert COMPUTE[sign](int(left), int(right)) == int(result), answer
            known.remove(int(left))
            known.remove(int(right))
            known.append(int(result))
        assert known == [numbers["result"]], f"a number was not used: {answer}"
        assert numbers_in(answer)[-1] == numbers["result"] > 0


def test_no_structure_draws_the_same_numbers_twice() -> None:
    for structure in STRUCTURES:
        stated = [tuple(numbers[key] for key in structure.operation.placeholders) for numbers in structure.draws()]
        assert len(stated) == len(set(stated)) >= 25


# --- the corpus


@pytest.mark.parametrize("split", SPLITS)
def test_sizes_are_as_requested(corpus: Path, split: str) -> None:
    for language in LANGUAGES:
        expected = getattr(SIZES, split, None) or (SIZES.english_base if language == "en" else SIZES.other_base)
        assert len(rows(corpus, split, language)) == expected


def test_rows_have_all_columns(corpus: Path) -> None:
    for split, language, row in all_rows(corpus):
        assert list(row) == ["id", "language", "structure", "question", "answer", "result"]
        assert row["language"] == language
        assert row["id"].startswith(f"{row['structure']}-")
        stated = [int(number) for number in combination(row)[1:]]
        assert sorted(numbers_in(row["question"])) == sorted(stated), (split, row)
        assert numbers_in(row["answer"])[-1] == row["result"]
        assert all(COMPUTE[sign](int(a), int(b)) == int(c) for a, sign, b, c in EQUATION.findall(row["answer"]))


def test_an_item_is_the_same_in_every_language(corpus: Path) -> None:
    for split in SPLITS:
        english = {row["id"]: row for row in rows(corpus, split, "en")}
        assert len(english) == len(rows(corpus, split, "en")), "no id twice"
        for language in LANGUAGES:
            theirs = rows(corpus, split, language)
            assert [row["id"] for row in theirs] == list(english)[: len(theirs)]
            for row in theirs:
                same = english[row["id"]]
                assert EQUATION.findall(row["answer"]) == EQUATION.findall(same["answer"])
                assert sorted(numbers_in(row["question"])) == sorted(numbers_in(same["question"]))
                assert (row["result"], row["structure"]) == (same["result"], same["structure"])


def test_no_combination_of_situation_and_numbers_is_in_two_splits(corpus: Path) -> None:
    where: dict[tuple[str, ...], set[str]] = {}
    for split, _, row in all_rows(corpus):
        where.setdefault(combination(row), set()).add(split)
    shared = {key: splits for key, splits in where.items() if len(splits) > 1}
    assert not shared
    assert {split for splits in where.values() for split in splits} == set(SPLITS)


def test_held_out_structures_are_only_in_the_unseen_test(corpus: Path) -> None:
    held_out = {structure.id for structure in STRUCTURES if structure.held_out}
    used: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, _, row in all_rows(corpus):
        used[split].add(row["structure"])
    assert used.pop("test_unseen") == held_out
    for structures in used.values():
        assert structures == {structure.id for structure in STRUCTURES} - held_out, "every structure is used"


def test_every_phrasing_is_used(corpus: Path) -> None:
    for language in LANGUAGES:
        answers = {row["question"]: row["id"] for row in rows(corpus, "finetune", language)}
        used: Counter[int] = Counter()
        for item in items_of("finetune", SIZES.finetune, SEED):
            used.update(number for number in range(3) if answers.get(render(item, language, number)[0]) == item.id)
        assert sum(used.values()) == SIZES.finetune
        assert min(used[number] for number in range(3)) > SIZES.finetune / 5


def test_splits_get_their_shares_of_the_number_sets() -> None:
    seen = [structure for structure in STRUCTURES if not structure.held_out]
    counts = Counter(split_of(structure, numbers, SEED) for structure in seen for numbers in structure.draws())
    for split, share in SHARES.items():
        assert counts[split] / counts.total() == pytest.approx(share / 100, abs=0.02)
    assert set(counts) == set(SHARES)


def test_the_seed_determines_every_byte(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", SIZES, SEED)
    write_corpus(tmp_path / "other", SIZES, SEED + 1)
    files = [file.relative_to(corpus) for file in corpus.rglob("*") if file.is_file()]
    assert len(files) == len(LANGUAGES) * (len(SPLITS) + 2)
    for file in files:
        content = (corpus / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == content
        assert (tmp_path / "other" / file).read_bytes() != content


@pytest.mark.parametrize("split", ["test_seen", "test_unseen"])
def test_tests_are_also_in_the_layout_of_mgsm(corpus: Path, split: str) -> None:
    for language in LANGUAGES:
        text = (corpus / f"mgsm_{split}" / f"mgsm_{language}.tsv").read_text(encoding="utf-8")
        assert text.endswith("\n")
        cells = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        assert cells == [[row["question"], str(row["result"])] for row in rows(corpus, split, language)]


def test_the_default_sizes_are_available() -> None:
    sizes = CorpusSizes()
    requested = dict(zip(SPLITS, (sizes.english_base, sizes.finetune, sizes.test_seen, sizes.test_unseen), strict=True))
    for split, n in requested.items():
        assert len({item.id for item in items_of(split, n, 0)}) == n
    assert sizes.other_base <= sizes.english_base


def test_a_size_above_the_supply_is_a_one_line_error() -> None:
    with pytest.raises(
        DataError, match=r"^toy corpus: 1000000 items requested from split test_seen, which has \d+$"
    ) as refusal:
        items_of("test_seen", 1_000_000, SEED)
    most = int(str(refusal.value).rsplit(" ", 1)[1])
    assert len(items_of("test_seen", most, SEED)) == most
    with pytest.raises(DataError):
        items_of("test_seen", most + 1, SEED)


def test_a_smaller_size_gives_the_first_items_of_a_larger_one() -> None:
    """So a smaller size is a part of a larger one."""
    assert items_of("finetune", 50, SEED) == items_of("finetune", 200, SEED)[:50]
