"""The hub dataset `google/xtreme`: one Parquet configuration for each task and language.

`data_dir` is the dataset's name, or a folder with one folder of Parquet files for each configuration.

Configurations and columns follow the dataset's former script (huggingface/datasets, `datasets/xtreme/xtreme.py`). It
has test labels, but no training data for XNLI. The script stripped contexts and answers and left the offsets unchanged
(TensorFlow Datasets found that this moved 25 % of TyDiQA's answers), so an answer is searched at the nearest place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.records import DataError
from data_pipeline.sources.tables import BATCH, load_hub
from data_pipeline.xtreme.items import (
    DOMINANT,
    NO_WORD,
    Item,
    Line,
    Pair,
    Question,
    Sentence,
    Source,
    Split,
    check_label,
)
from data_pipeline.xtreme.tasks import TATOEBA_CODES, XtremeTask

if TYPE_CHECKING:
    from datasets import Dataset

UD_NAMES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "kk": "Kazakh", "ko": "Korean", "mr": "Marathi", "nl": "Dutch", "pt": "Portuguese", "ru": "Russian",
    "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "ur": "Urdu", "vi": "Vietnamese",
    "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip
UD_SPLITS: dict[str, tuple[Split, ...]] = {"kk": ("train", "test"), "th": ("test",), "tl": ("test",), "yo": ("test",)}
TYDIQA_NAMES = {
    "ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian", "ko": "korean",
    "ru": "russian", "sw": "swahili", "te": "telugu",
}  # fmt: skip
MOVED_AT_MOST = 1000  # characters of white space that stripping may have removed


def source(task: XtremeTask, split: Split, language: str, data_dir: Path | str) -> Source | None:
    """The source of a split of a language; None if the hub has no such split. A folder's files need not exist."""
    place = _place(task, split, language)
    if place is None:
        return None
    config, name = place
    read = partial(_items, str(data_dir), config, name, task, language)
    if not Path(data_dir).is_dir():
        return Source((), read, identity=lambda: _load(str(data_dir), config, name)._fingerprint)
    files = tuple(sorted(Path(data_dir, config).glob(f"{name}*.parquet")))
    return Source(files or (Path(data_dir, config, f"{name}-00000-of-00001.parquet"),), read)


def _place(task: XtremeTask, split: Split, language: str) -> tuple[str, str] | None:
    """(configuration, split) of the hub."""
    name = {"train": "train", "dev": "validation", "test": "test"}[split]
    english = language == DOMINANT
    if task.name == "xnli":
        return None if split == "train" else ("XNLI", name)
    if task.name == "pawsx":
        return None if split == "train" and not english else (f"PAWS-X.{language}", name)
    if task.name == "panx":
        return f"PAN-X.{language}", name
    if task.name == "udpos":
        return (f"udpos.{UD_NAMES[language]}", name) if split in UD_SPLITS.get(language, (split,)) else None
    if task.name == "tydiqa":
        return {"train": ("tydiqa", "train"), "test": ("tydiqa", "validation")}.get(split)
    if task.name == "tatoeba":
        return (f"tatoeba.{TATOEBA_CODES[language]}", "validation") if split == "test" else None
    if task.name == "bucc2018":  # the hub has only the sentences of gold pairs, so nothing could be mined
        return None
    if split == "train" or (split == "dev" and task.name == "xquad"):
        return ("SQuAD", name) if english else None
    return (f"MLQA.{language}.{language}", name) if task.name == "mlqa" else (f"XQuAD.{language}", "validation")


def _load(path: str, config: str, split: str) -> Dataset:
    local = Path(path, config)
    return load_hub(str(local), None, split) if local.is_dir() else load_hub(path, config, split)


def _items(path: str, config: str, split: str, task: XtremeTask, language: str) -> Iterator[Item]:
    dataset = _load(path, config, split)
    where = f"{path}/{config}[{split}]"
    index = count()
    for start in range(0, len(dataset), BATCH):
        columns = dataset[start : start + BATCH]
        for number, values in enumerate(zip(*columns.values(), strict=True), start + 1):
            row = dict(zip(columns, values, strict=True))
            place = f"{where}:{number}"
            if not _is_of(task, language, row):
                continue
            try:
                yield _item(task, language, dataset, row, place, next(index))
            except KeyError as error:
                raise DataError(
                    f"{where}: no column {error}; the columns are {', '.join(map(repr, columns))}"
                ) from None


def _is_of(task: XtremeTask, language: str, row: dict[str, Any]) -> bool:
    """Whether a row is of the language: XNLI and TyDiQA have one configuration for all languages."""
    if task.name == "xnli":
        return bool(row["language"] == language)
    return task.name != "tydiqa" or str(row["id"]).startswith(f"{TYDIQA_NAMES[language]}-")


def _item(task: XtremeTask, language: str, dataset: Dataset, row: dict[str, Any], place: str, index: int) -> Item:
    if task.kind == "classification":
        label = str(row["gold_label" if task.name == "xnli" else "label"])
        check_label(label, task, place)
        return Pair(place, index, row["sentence1"].strip(), row["sentence2"].strip(), label)
    if task.kind == "tagging":
        column = "ner_tags" if task.name == "panx" else "pos_tags"
        tags = _names(row[column], dataset, column)
        for tag in tags:
            check_label(tag, task, place)
        words = tuple(word if word.strip() else NO_WORD for word in row["tokens"])
        if len(words) != len(tags):
            raise DataError(f"{place}: {len(words)} tokens, but {len(tags)} {column}")
        return Sentence(place, index, words, tuple(tags))
    if task.kind == "retrieval":
        text, partner = row["source_sentence"].strip(), row["target_sentence"].strip()
        return Line(place, index, f"{task.name}-test-{language}-{index}", language, text, partner)
    answers, misplaced = _answers(row, place)
    none = not answers and misplaced is None and not _entries(row)
    return Question(
        place, index, row["id"], row["question"], row["context"], answers, misplaced=misplaced, unanswerable=none
    )


def _names(values: Sequence[Any], dataset: Dataset, column: str) -> list[str]:
    """Tags as text: the tags of a ClassLabel column are numbers, and its features hold their names."""
    feature = getattr(dataset.features[column], "feature", None)
    names = getattr(feature, "names", None)
    return [names[value] if names is not None else str(value) for value in values]


def _entries(row: dict[str, Any]) -> list[dict[str, Any]]:
    given = row["answers"]
    if isinstance(given, dict):  # as `datasets` stores a list of {text, answer_start}
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    return list(given)


def _answers(row: dict[str, Any], place: str) -> tuple[tuple[tuple[str, int], ...], str | None]:
    """Answers, each at the nearest place of its text, and the reason for the first one that is not found."""
    found, misplaced = [], None
    for answer in _entries(row):
        text, start = answer["text"], answer["answer_start"]
        if text and (nearest := _nearest(row["context"], text, start)) is not None:
            found.append((text, nearest))
        elif text:
            misplaced = misplaced or (
                f"{place}: question {row['id']}: answer {text[:40]!r} is not near character {start} of the context"
            )
    return tuple(found), misplaced


def _nearest(context: str, text: str, start: int) -> int | None:
    if context.startswith(text, start):
        return start
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    nearest = min(places, key=lambda at: abs(at - start), default=None)
    return nearest if nearest is not None and abs(nearest - start) <= MOVED_AT_MOST else None
