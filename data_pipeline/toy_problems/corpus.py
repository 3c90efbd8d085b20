"""The toy corpus: word problems drawn from the structures, rendered in ten languages, in splits without leakage.

`write_corpus` writes JSONL files a split and language, and the test splits in MGSM's layout; `crosslift quickstart`
trains and scores on them.

An item is a situation with its numbers and a name. Whatever the language or phrasing, a (structure, numbers)
combination belongs to exactly one of `base`, `finetune` and `test_seen`; held-out structures are in `test_unseen`
alone. So `test_seen` has known situations with new numbers, and `test_unseen` has new situations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from data_pipeline.records import DataError, stable_hash
from data_pipeline.toy_problems.structures import STRUCTURES, Structure

LANGUAGES = ("en", "de", "es", "fr", "ru", "zh", "ja", "th", "sw", "bn")
PHRASINGS = 3
T = TypeVar("T")
Split = Literal["base", "finetune", "test_seen", "test_unseen"]
SHARES: Mapping[Split, int] = {"base": 60, "finetune": 25, "test_seen": 15}  # per cent of the number sets


@dataclass(frozen=True, slots=True)
class ToyItem:
    """One problem, independent of language. `numbers` holds drawn and computed ones, `result` among them."""

    structure: Structure
    numbers: Mapping[str, int]
    name: int  # index into each language's names; 0 if the structure has no {name}

    @property
    def id(self) -> str:
        numbers = "-".join(str(self.numbers[key]) for key in self.structure.operation.placeholders)
        return f"{self.structure.id}-{numbers}-{self.name}"


@dataclass(frozen=True, slots=True)
class CorpusSizes:
    """Number of rows of each language and split."""

    english_base: int = 8000
    other_base: int = 120
    finetune: int = 1500
    test_seen: int = 100
    test_unseen: int = 100


@cache
def phrasings(language: str) -> dict[str, Any]:
    """The templates of a language: `answer`, `names`, and three questions a structure."""
    path = Path(__file__).with_name("phrasings") / f"{language}.yaml"
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def render(item: ToyItem, language: str, phrasing: int) -> tuple[str, str]:
    """(question, answer) of an item in a language, in one of its three phrasings."""
    words = phrasings(language)
    values = {**item.numbers, "name": words["names"][item.name]}
    question = words["structures"][item.structure.id][phrasing].format(**values)
    working = item.structure.operation.working.format(**item.numbers)
    return question, words["answer"].format(working=working, **item.numbers)


def split_of(structure: Structure, numbers: Mapping[str, int], seed: int) -> Split:
    """The only split in which this combination may occur."""
    if structure.held_out:
        return "test_unseen"
    stated = [numbers[key] for key in structure.operation.placeholders]
    place = stable_hash(seed, "split", structure.id, *stated) % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("shares sum to 100")


def items_of(split: Split, n: int, seed: int) -> list[ToyItem]:
    """The first `n` items of a split, alternating over structures, in an order fixed by the seed.

    Raises:
        DataError: the split has fewer items.
    """
    columns = [
        sorted(_items(structure, split, seed), key=lambda item: stable_hash(seed, split, item.id))
        for structure in STRUCTURES
    ]
    items = in_turns(columns)
    if n > len(items):
        raise DataError(f"toy corpus: {n} items requested from split {split}, which has {len(items)}")
    return items[:n]


def in_turns(columns: Iterable[Sequence[T]]) -> list[T]:
    """The first element of each, then the second of each, and so on."""
    return [each for each in chain.from_iterable(zip_longest(*columns)) if each is not None]


def write_corpus(output: Path, sizes: CorpusSizes, seed: int) -> None:
    """Write `<split>/<language>.jsonl` for all splits, and `mgsm_<split>/mgsm_<language>.tsv` for the tests.

    Rows: id, language, structure, question, answer, result; the same id is the same item in every language.
    """
    base = items_of("base", sizes.english_base, seed)
    parallel: dict[Split, list[ToyItem]] = {
        split: items_of(split, getattr(sizes, split), seed) for split in ("finetune", "test_seen", "test_unseen")
    }
    for language in LANGUAGES:
        _write_rows(output / "base", language, base if language == "en" else base[: sizes.other_base])
        for split, items in parallel.items():
            _write_rows(output / split, language, items)
    for split in ("test_seen", "test_unseen"):
        folder = output / f"mgsm_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for language in LANGUAGES:
            lines = [f"{row['question']}\t{row['result']}\n" for row in _rows(language, parallel[split])]
            (folder / f"mgsm_{language}.tsv").write_text("".join(lines), encoding="utf-8")


def _items(structure: Structure, split: Split, seed: int) -> Iterator[ToyItem]:
    names = len(phrasings("en")["names"]) if structure.named else 1
    for numbers in structure.draws():
        if split_of(structure, numbers, seed) == split:
            for name in range(names):
                yield ToyItem(structure, numbers, name)


def _rows(language: str, items: Iterable[ToyItem]) -> Iterator[dict[str, Any]]:
    for item in items:
        question, answer = render(item, language, stable_hash(language, item.id) % PHRASINGS)
        yield {
            "id": item.id, "language": language, "structure": item.structure.id,
            "question": question, "answer": answer, "result": item.numbers["result"],
        }  # fmt: skip


def _write_rows(folder: Path, language: str, items: Iterable[ToyItem]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(language, items)]
    (folder / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
