"""Match machine translations with labelled items: training items in other languages, any item back in English.

A training translation has the `group` of its English original, which pairs the two; an English version is in
the `back_*` fields. Files that do not match are refused, with both names and the first difference. What a translation
lost (an answer that is no longer in the context, an empty text) is left out and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat, zip_longest
from pathlib import Path
from typing import TypeVar, cast

from data_pipeline.records import DataError
from data_pipeline.xtreme import bucket, xmixup
from data_pipeline.xtreme.items import (
    DOMINANT,
    Item,
    Pair,
    Question,
    Row,
    Sentence,
    Source,
    Split,
    group_of,
    is_empty,
    to_row,
)
from data_pipeline.xtreme.squad import repeated_id
from data_pipeline.xtreme.tasks import XtremeTask

T = TypeVar("T")
MATCHED_SHARE = 0.9  # share of translations whose original must be found for the files to match
LOST_ANSWER, EMPTY, NO_ORIGINAL = "answer not in the context", "empty text", "no such English original"
LOST_BACK = "back-translation missing or empty (row kept)"


def training_translation(task: XtremeTask, language: str, folder: Path) -> Source | None:
    """The existing translated training items: the X-Mixup authors' before the bucket's. None: neither."""
    found = (layout.training_translation(task, language, folder) for layout in (xmixup, bucket))
    return next((source for source in found if source is not None and source.exists()), None)


def back_translation(task: XtremeTask, split: Split, language: str, folder: Path) -> Source | None:
    """The existing English version of a split's items. None: there is none, or the items are English."""
    if language == DOMINANT:
        return None
    found = (layout.back_translation(task, split, language, folder) for layout in (xmixup, bucket))
    return next((source for source in found if source is not None and source.exists()), None)


def translated_rows(
    task: XtremeTask, language: str, english: Source, translated: Source, back: Source | None, lost: Counter[str]
) -> Iterator[Row]:
    """The training rows of a translation. `lost` counts what is left out. Raises DataError: files do not match."""
    items: Iterator[tuple[str | None, Item]]
    if translated.by == "place":
        items = ((group_of(task, "train", DOMINANT, one), other) for one, other in _in_place(english, translated))
    else:
        items = (_by_id if translated.by == "id" else _by_text)(task, english, translated)
    for (group, item), version in _together(items, _versions("train", translated, back)):
        if is_empty(item):
            lost[EMPTY] += 1
        elif group is None:
            lost[NO_ORIGINAL] += 1
        elif isinstance(item, Question) and not item.answers:
            lost[LOST_ANSWER] += 1
        else:
            yield to_row(task, "train", language, item, group, _usable(version, back, lost))


def with_versions(
    split: Split, items: Iterable[Item], gold: Source, back: Source | None, lost: Counter[str]
) -> Iterator[tuple[Item, Item | None]]:
    """The `items` of `gold`, each with its English version if `back` has one.

    Raises DataError: the files do not match.
    """
    for item, version in _together(items, _versions(split, gold, back)):
        yield item, None if is_empty(item) else _usable(version, back, lost)


def _together(items: Iterable[T], versions: Iterator[Item | None]) -> Iterator[tuple[T, Item | None]]:
    for item in items:
        yield item, next(versions, None)
    next(versions, None)  # resumes the generator, which checks that its files have the same length


def _versions(split: Split, items: Source, back: Source | None) -> Iterator[Item | None]:
    if back is None:
        yield from repeat(None)
    elif back.by == "id":
        yield from _partners(items, back, every=split != "train")
    else:
        yield from (version for _, version in _in_place(items, back))


def _usable(version: Item | None, back: Source | None, lost: Counter[str]) -> Item | None:
    if back is None or (version is not None and not is_empty(version)):
        return version
    lost[LOST_BACK] += 1
    return None


def _in_place(first: Source, second: Source) -> Iterator[tuple[Item, Item]]:
    """Items by place; labels and the files' own ids, where both sides have them, must be equal."""
    left, right = first.read(), second.read()
    n_items = n_other = 0
    differs: Pair | None = None
    for one, other in zip_longest(left, right):
        if one is None or other is None:
            longer, shorter, extra = (first, second, one) if other is None else (second, first, other)
            rest = [item for item in (left if other is None else right) if not _is_blank_line(item)]
            if _is_blank_line(extra) and not rest:
                break
            raise DataError(
                f"{shorter.name}: {n_items} items, but {longer.name} has {n_items + 1 + len(rest)}: no match for"
                f" {extra.place}; the files must match item by item"
            )
        n_items += 1
        if isinstance(one, Pair) and isinstance(other, Pair):
            _check_same(one, other)
            if other.original is not None and _key(*other.original) != _key(one.text_a, one.text_b):
                n_other, differs = n_other + 1, differs or other
        yield one, other
    if differs is not None and n_other > (1 - MATCHED_SHARE) * n_items:
        raise DataError(
            f"{differs.place}: is a translation of another text than {first.name} has at this place, like {n_other} of"
            f" {n_items} lines; the files must match line by line"
        )


def _is_blank_line(item: Item) -> bool:
    """Whether a sentence is only a blank line: at the end of a file there may be more of them."""
    return isinstance(item, Sentence) and is_empty(item)


def _check_same(one: Pair, other: Pair) -> None:
    for what, ours, theirs in (("label", one.label, other.label), ("id", one.name, other.name)):
        if ours is not None and theirs is not None and ours != theirs:
            raise DataError(
                f"{other.place}: {what} {theirs!r}, but {one.place} has {ours!r}; the files must match line by line"
            )


def _by_text(task: XtremeTask, english: Source, translated: Source) -> Iterator[tuple[str | None, Item]]:
    """(group of the original, item); None if the original's texts and label are not among the English items."""
    places: defaultdict[int, deque[int]] = defaultdict(deque)
    for item in english.read():
        if isinstance(item, Pair):
            places[_key(item.text_a, item.text_b, item.label or "")].append(item.index)
    n_items = n_found = 0
    first: Pair | None = None
    for item in translated.read():
        if not isinstance(item, Pair) or is_empty(item):
            yield None, item
            continue
        found = places.get(_key(*(item.original or ("", "")), item.label or ""))
        n_items, n_found = n_items + 1, n_found + (found is not None)
        if found is None:
            first = first or item
            yield None, item
            continue
        index = found.popleft() if len(found) > 1 else found[0]  # a repeated pair is translated twice
        yield group_of(task, "train", DOMINANT, Pair("", index, "", "")), item
    if first is not None and n_found < MATCHED_SHARE * n_items:
        raise DataError(
            f"{first.place}: its original is not in {english.name}, nor are those of {n_items - n_found} of {n_items}"
            " lines; the originals of the translations must be the English training items"
        )


def _by_id(task: XtremeTask, english: Source, translated: Source) -> Iterator[tuple[str | None, Item]]:
    originals = _partners(translated, english, every=True)
    for item, original in zip(translated.read(), originals, strict=True):
        yield None if original is None else group_of(task, "train", DOMINANT, original), item


def _partners(source: Source, other: Source, every: bool) -> list[Question | None]:
    """For each question of `source`, the question of `other` with its id; by place if a file repeats an id.

    `every`: a question without a partner is an error; otherwise only if none has one.
    """
    questions, others = _questions(source), _questions(other)
    repeated = repeated_id(questions) or repeated_id(others)
    if repeated is not None:
        _check_places(source, other, questions, others, repeated)
        return list(others)
    by_id = {question.id: question for question in others}
    found = [by_id.get(question.id) for question in questions]
    without = next((question for question, one in zip(questions, found, strict=True) if one is None), None)
    if without is not None and (every or not any(found)):
        raise DataError(
            f"{other.name}: no question {without.id!r}, which {source.name} has; both must have the same ids"
        )
    return found


def _check_places(
    source: Source, other: Source, questions: Sequence[Question], others: Sequence[Question], repeated: str
) -> None:
    reason = f"id {repeated!r} is given to several questions, so questions are matched by their places"
    if len(questions) != len(others):
        raise DataError(f"{other.name}: {len(others)} questions, but {source.name} has {len(questions)}; {reason}")
    for one, two in zip(questions, others, strict=True):
        short, long = sorted((one.id.partition("#")[0], two.id.partition("#")[0]), key=len)
        if not long.endswith(short):  # XTREME's download script cuts "english-123-1" to "1"
            raise DataError(f"{two.place}: is at the place of question {one.id!r} in {source.name}; {reason}")


def _questions(source: Source) -> list[Question]:
    return cast("list[Question]", list(source.read()))


def _key(*texts: str) -> int:
    """Equal for texts that differ only in white space or quotes, which writers of these files treat differently."""
    return hash(tuple("".join(text.replace('"', "").split()) for text in texts))
