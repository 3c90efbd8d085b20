"""A labelled toy task, parallel in ten languages: classify the kind of a word problem.

`write_labelled_task` writes canonical JSONL rows for comparing zero-shot transfer, translate-train and X-Mixup
(arXiv 2205.04182).

    text/<language>.jsonl         unlabelled sentences; more of them in some languages than in others
    train/<language>.jsonl        English originals; the other languages are translated from them
    dev/, test_seen/<language>.jsonl   known situations, with new numbers and in a new wording
    test_unseen/<language>.jsonl  situations without any labelled training example

An item is at the same place of the same file of every language, with the same `group`. An original is in one of its
structure's three wordings, and so is a translation (see `wordings`), which also lacks words (see `drop_words`).
`back_text_a`, in every language but English, is the text translated into English: of a translation in `train`, which
makes it a round trip, and of an original elsewhere.

A (structure, numbers) combination belongs to one folder, in all languages and wordings. Situations of `test_unseen`
occur in `text`, without labels and with other numbers, as an encoder sees most words before fine-tuning.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.atomic import atomic_folder
from data_pipeline.records import DataError, stable_hash
from data_pipeline.toy_problems.corpus import LANGUAGES, PHRASINGS, ToyItem, in_turns, phrasings, render
from data_pipeline.toy_problems.structures import STRUCTURES, Structure

DOMINANT = "en"
UNSPACED = ("zh", "ja", "th")  # written without spaces between words

CLASSES: Mapping[str, tuple[str, ...]] = {
    # parts of different kinds, times or places are put together
    "total": (
        "fruit_bought", "class_size", "pages_day", "tulips_planted", "bus_boarding", "savings_months", "weekend_walk",
        "farm_animals", "fish_caught", "problems_solved", "dishes_washed", "tickets_sold", "shells_found",
    ),
    # something is removed; what remains?
    "remainder": (
        "apples_eaten", "bus_leaving", "balloons_burst", "chapters_left", "eggs_broken", "money_spent", "birds_flown",
        "candles_out", "cars_parked", "stamps_given", "water_used",
    ),
    # equal groups, counted together
    "groups": (
        "pencil_boxes", "chair_rows", "orange_bags", "book_shelves", "rose_bouquets", "cookie_trays", "wedding_tables",
    ),
    # an amount for each day, hour or ticket, multiplied
    "repeated": ("pages_week", "wages_earned", "ticket_cost", "daily_run"),
    # a whole is divided equally; how large is a part, or how many parts?
    "share": ("rice_sacks", "rope_pieces", "ribbon_gifts", "prize_shared", "crate_weight"),
    # an amount spread evenly over time; how much for each hour or day, or for how long?
    "rate": ("hike_days", "hourly_pay", "cyclist_speed", "tent_savings"),
    # two changes, one after the other
    "two_steps": (
        "apples_picked_given", "bus_two_stops", "pencils_and_loose", "wages_and_tip", "oranges_packed_sold",
        "theatre_seats", "weekend_money", "egg_cartons",
    ),
}  # fmt: skip
LABELS = tuple(CLASSES)
# The held-out structures, and one structure of each class without a held-out one.
UNSEEN = frozenset({structure.id for structure in STRUCTURES if structure.held_out} | {"daily_run", "hike_days"})

Split = Literal["text", "train", "dev", "test_seen", "test_unseen"]
LABELLED: tuple[Split, ...] = ("train", "dev", "test_seen", "test_unseen")
# Per cent of a structure's number sets.
SEEN_SHARES: Mapping[Split, int] = {"text": 30, "train": 40, "dev": 10, "test_seen": 20}
UNSEEN_SHARES: Mapping[Split, int] = {"text": 50, "test_unseen": 50}


@dataclass(frozen=True, slots=True)
class LabelledSizes:
    """Items of each labelled folder, and sentences of `text` by language (a language left out gets no file).

    `noise` is the share of words that a translation loses.
    """

    n_train: int = 700
    n_dev: int = 140
    n_test_seen: int = 350
    n_test_unseen: int = 350
    n_text: Mapping[str, int] = field(
        default_factory=lambda: {language: 10_000 if language == DOMINANT else 1_000 for language in LANGUAGES}
    )
    noise: float = 0.1


def write_labelled_task(folder: Path, sizes: LabelledSizes, seed: int) -> None:
    """Write the whole task, a pure function of `sizes` and `seed`; `folder` appears when it is complete.

    Raises:
        DataError: `folder` exists, a size exceeds the supply, a language is unknown, or `noise` is not in [0, 1).
    """
    if folder.exists():
        raise DataError(f"{folder}: exists already; give a new folder")
    _check(sizes)
    files = {f"text/{language}": rows for language, rows in _text_rows(sizes.n_text, seed).items()}
    for split in LABELLED:
        items = labelled_items(split, getattr(sizes, f"n_{split}"), seed)
        for language in LANGUAGES:
            files[f"{split}/{language}"] = [_labelled_row(item, split, language, sizes.noise, seed) for item in items]
    with atomic_folder(folder) as temporary:
        for name, rows in files.items():
            path = temporary / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def label_of(structure: Structure) -> str:
    """The class of a structure's problems."""
    return next(label for label, members in CLASSES.items() if structure.id in members)


def labelled_items(split: Split, n: int, seed: int) -> list[ToyItem]:
    """The first `n` items of a labelled split, alternating over classes and, in a class, over structures.

    So class counts differ by at most one. Raises DataError if a class has too few items.
    """
    by_class = [
        in_turns([_items(structure, split, seed) for structure in STRUCTURES if structure.id in members])
        for members in CLASSES.values()
    ]
    most = len(LABELS) * min(map(len, by_class))
    if n > most:
        raise DataError(f"labelled toy task: {n} items requested from {split}, which has {most} in equal classes")
    return in_turns(by_class)[:n]


def wordings(item: ToyItem, split: Split, seed: int) -> tuple[int, int]:
    """(originals', translations'): the wording, of the three in every language, that each of them has for an item.

    One wording of each seen structure, the same in all languages, is reserved for `dev` and `test_seen`, so these need
    more than known sentences with other numbers. There, translations use it too, because a test translated into a
    wording of `train` would be easier in English than an English test. Elsewhere the two differ.
    """
    kept = stable_hash(seed, "kept wording", item.structure.id) % PHRASINGS
    if split in ("dev", "test_seen"):
        return kept, kept
    allowed = [wording for wording in range(PHRASINGS) if split != "train" or wording != kept]
    first = stable_hash(seed, "wording", item.id) % len(allowed)
    return allowed[first], allowed[(first + 1) % len(allowed)]


def drop_words(text: str, language: str, share: float, *key: object) -> str:
    """`text` without some of its words, each dropped with probability `share`, decided by `key` and its position.

    Words are separated by spaces; a word with a digit is kept. In Chinese, Japanese and Thai a word is a single letter
    with its marks (Latin letters, as in km, are kept), dropped half as often, because a word has about two letters.
    """
    if language in UNSPACED:
        units, glue, share = _letters(text), "", share / 2
    else:
        units, glue = text.split(" "), " "
    return glue.join(
        unit
        for place, unit in enumerate(units)
        if not _may_drop(unit, language) or stable_hash(*key, place) >= share * 2**63
    )


def _may_drop(unit: str, language: str) -> bool:
    if language in UNSPACED:
        return unit[0].isalpha() and not unit.isascii()
    return not any(letter.isdigit() for letter in unit)


def _letters(text: str) -> list[str]:
    """Each character with its combining marks."""
    units: list[str] = []
    for character in text:
        if units and unicodedata.category(character).startswith("M"):
            units[-1] += character
        else:
            units.append(character)
    return units


def _labelled_row(item: ToyItem, split: Split, language: str, noise: float, seed: int) -> dict[str, Any]:
    written, translated = wordings(item, split, seed)

    def text(of: str, is_translation: bool) -> str:
        whole, _ = render(item, of, translated if is_translation else written)
        return drop_words(whole, of, noise, seed, "drop", item.id, language, of) if is_translation else whole

    row = {
        "id": f"{item.id}-{language}", "group": item.id, "language": language,
        "text_a": text(language, is_translation=split == "train" and language != DOMINANT),
        "label": label_of(item.structure),
    }  # fmt: skip
    return row if language == DOMINANT else row | {"back_text_a": text(DOMINANT, is_translation=True)}


def _text_rows(counts: Mapping[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Every item in all wordings, alternating over structures; a language with fewer sentences has the first ones."""
    columns = []
    for structure in STRUCTURES:
        sentences = [(item, wording) for item in _items(structure, "text", seed) for wording in range(PHRASINGS)]
        columns.append(sorted(sentences, key=lambda each: stable_hash(seed, "text", each[0].id, each[1])))
    sentences = in_turns(columns)
    rows = {}
    for language, n in counts.items():
        if n > len(sentences):
            raise DataError(
                f"labelled toy task: {n} sentences requested from text/{language}, which has {len(sentences)}"
            )
        rows[language] = [
            {
                "id": f"{item.id}-{wording}-{language}", "group": f"{item.id}-{wording}", "language": language,
                "text": render(item, language, wording)[0],
            }
            for item, wording in sentences[:n]
        ]  # fmt: skip
    return rows


def _items(structure: Structure, split: Split, seed: int) -> list[ToyItem]:
    """All items of a structure that belong to a split, in an order fixed by the seed."""
    names = len(phrasings(DOMINANT)["names"]) if structure.named else 1
    items = [ToyItem(structure, numbers, name) for numbers in _numbers(structure, split, seed) for name in range(names)]
    return sorted(items, key=lambda item: stable_hash(seed, split, item.id))


def _numbers(structure: Structure, split: Split, seed: int) -> list[dict[str, int]]:
    """The split's share of a structure's number sets, which are shuffled and cut so that every split gets some."""

    def place(numbers: Mapping[str, int]) -> int:
        return stable_hash(seed, "numbers", structure.id, *(numbers[key] for key in structure.operation.placeholders))

    shares = UNSEEN_SHARES if structure.id in UNSEEN else SEEN_SHARES
    if split not in shares:
        return []
    shuffled = sorted(structure.draws(), key=place)
    before = sum(shares[other] for other in list(shares)[: list(shares).index(split)])
    start, stop = (len(shuffled) * per_cent // 100 for per_cent in (before, before + shares[split]))
    return shuffled[start:stop]


def _check(sizes: LabelledSizes) -> None:
    for name in sizes.n_text:
        if name not in LANGUAGES:
            raise DataError(f"n_text: no language {name!r} in the toy problems; there are {', '.join(LANGUAGES)}")
    if not 0 <= sizes.noise < 1:
        raise DataError(f"noise: {sizes.noise} is not a share; give one from 0 to less than 1")
    texts = [(f"text/{language}", n) for language, n in sizes.n_text.items()]
    for name, n in [(each, getattr(sizes, f"n_{each}")) for each in LABELLED] + texts:
        if n < 0:
            raise DataError(f"labelled toy task: {n} requested of {name}; give 0 or more")
