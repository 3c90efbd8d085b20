"""The items of XTREME's files in any layout: sentence pairs, tagged sentences, questions, plain lines.

Every reader yields these items. `Source` names files and how to read them; `to_row` gives the canonical row of an item,
with the columns that `data_pipeline.tasks` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_pipeline.records import DataError
from data_pipeline.xtreme.tasks import XtremeTask

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
DOMINANT = "en"  # the only language with training labels in XTREME
NO_WORD = "\ufffd"  # replaces an empty or blank word, so that its tag keeps its place
SAME_LABELS = 10  # from this many test items on, a single label for all of them is a placeholder

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair of sentences. `original`: the texts that these translate, if the file has them."""

    place: str  # "file:line", for messages
    index: int  # place among the file's items, from 0; the same in translations
    text_a: str
    text_b: str
    label: str | None = None
    name: str | None = None  # the file's own id
    original: tuple[str, str] | None = None

    @property
    def answer(self) -> object:
        return self.label


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words with tags, or with a teacher's probabilities in the order of the task's labels.

    A sentence without words is an extra blank line, or `withheld`: its words are in no file.
    """

    place: str
    index: int
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    soft_tags: tuple[tuple[float, ...], ...] | None = None
    text: str | None = None  # the sentence as written; without it, the words joined by spaces
    withheld: bool = False

    @property
    def answer(self) -> object:
        return self.tags if self.tags is not None else self.soft_tags


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a context. `answers`: (text, its character offset in the context).

    `misplaced`: the reason why an answer is left out, because it is not at the offset in the file. `unanswerable`: the
    file marks it as without an answer (SQuAD 2.0), as opposed to an erased one.
    """

    place: str
    index: int
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    misplaced: str | None = None
    unanswerable: bool = False

    @property
    def answer(self) -> object:
        return self.answers or None


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence of a retrieval task. `translation`: its partner, if the files have it."""

    place: str
    index: int
    id: str
    language: str
    text: str
    translation: str | None = None

    @property
    def answer(self) -> object:
        return self.translation


Item = Pair | Sentence | Question | Line


@dataclass(frozen=True)
class Source:
    """The files of one task, split and language. Each call of `read` starts from the beginning.

    `by`: how the lines of a translation file are matched with their originals. `identity`: identifies the state of a
    hub dataset, which has no files to compare.
    """

    files: tuple[Path, ...]
    read: Callable[[], Iterator[Item]]
    by: Literal["place", "text", "id"] = "place"
    identity: Callable[[], str] | None = None

    def exists(self) -> bool:
        return self.identity is not None or (bool(self.files) and all(file.is_file() for file in self.files))

    @property
    def name(self) -> str:
        return " + ".join(map(str, self.files[:2])) + (" ..." if len(self.files) > 2 else "")


def to_row(
    task: XtremeTask, split: Split, language: str, item: Item, group: str | None = None, back: Item | None = None
) -> Row:
    """The canonical row of an item. `back`: its machine translation into the dominant language.

    Ids are a question's own id, otherwise task, split and place in the file. Parallel rows share the `group`: pairs by
    their line, questions by their id. Tagged sentences and TyDiQA are not parallel.
    """
    head: Row = {"id": item_id(task, split, language, item), "group": group or group_of(task, split, language, item)}
    if isinstance(item, Line):
        partner = {} if item.translation is None else {"translation": item.translation}
        return {**head, "language": item.language, "text": item.text, **partner}
    row: Row = {**head, "language": language}
    if isinstance(item, Pair):
        row |= {"text_a": item.text_a, "text_b": item.text_b}
        row |= {} if item.label is None else {"label": item.label}
    elif isinstance(item, Sentence):
        row |= {"text": item.text or " ".join(item.words), "words": list(item.words)}
        row |= {} if item.tags is None else {"tags": list(item.tags)}
        row |= {} if item.soft_tags is None else {"soft_tags": [list(values) for values in item.soft_tags]}
    else:
        row |= {"question": item.question, "context": item.context, "answers": _answers(item)}
    return row | (_back(back) if back is not None else {})


def check_label(label: str, task: XtremeTask, place: str, what: str = "label") -> None:
    """Raises DataError for a label that the task does not have."""
    if label not in task.labels:
        raise DataError(f"{place}: {what} {label!r} is not one of {task.name}'s: {', '.join(task.labels)}")


def item_id(task: XtremeTask, split: Split, language: str, item: Item) -> str:
    if isinstance(item, Question | Line):
        return item.id
    within = "" if isinstance(item, Pair) else f"{language}-"
    return f"{task.name}-{split}-{within}{item.index}"


def group_of(task: XtremeTask, split: Split, language: str, item: Item) -> str:
    if isinstance(item, Question):
        return (
            f"{task.name}-{split}-{language}-{item.id}" if task.name == "tydiqa" else f"{task.name}-{split}-{item.id}"
        )
    return item_id(task, split, language, item)


def is_empty(item: Item) -> bool:
    """Whether a text that must not be empty is empty."""
    if isinstance(item, Pair):
        return not (item.text_a and item.text_b)
    if isinstance(item, Sentence):
        return not item.words
    return not (item.question and item.context) if isinstance(item, Question) else not item.text


def is_left_out(item: Item) -> bool:
    """Whether a question cannot be scored: it is unanswerable, or all its answers are misplaced."""
    return isinstance(item, Question) and (item.unanswerable or (item.misplaced is not None and not item.answers))


def checked_test(task: XtremeTask, items: Iterable[Item], where: str, allow_unlabelled: bool) -> list[Item]:
    """The test items; without labels if these were erased and the caller allows it.

    Labels count as erased if they are missing, or if all of at least ten items have the same label: readers of XTREME's
    erased files write such a placeholder. Raises DataError: labels are erased and this is not allowed, or only some
    exist.
    """
    found = list(items)
    if task.name == "bucc2018":  # its gold pairs are in a separate file
        return found
    filled = [item for item in found if not (is_empty(item) or is_left_out(item))]
    without = [item for item in filled if item.answer is None]
    if without and len(without) < len(filled):
        raise DataError(f"{without[0].place}: has no label, but others of the file have one; all or none must have one")
    none_has_one = not filled and any(isinstance(item, Question) and item.unanswerable for item in found)
    if not without and not none_has_one and not _one_label(found):
        return found
    if not allow_unlabelled:
        raise DataError(
            f"{where}: the test labels of {task.name} are erased, as XTREME's download script leaves them; put the"
            " labelled files of the dataset's authors there, or allow unlabelled test rows (for predictions only)"
        )
    return [_unlabelled(item) for item in found]


def _one_label(items: list[Item]) -> bool:
    labels: set[object] = set()
    for item in items:
        if isinstance(item, Pair):
            labels.add(item.label)
        elif isinstance(item, Sentence):
            labels.update(item.tags or ())
    return len(labels) == 1 and len(items) >= SAME_LABELS


def _unlabelled(item: Item) -> Item:
    if isinstance(item, Pair):
        return replace(item, label=None)
    if isinstance(item, Sentence):
        return replace(item, tags=None, soft_tags=None)
    return replace(item, unanswerable=False) if isinstance(item, Question) else item


def _answers(item: Question) -> list[Row]:
    return [{"text": text, "answer_start": start} for text, start in item.answers]


def _back(item: Item) -> Row:
    if isinstance(item, Pair):
        return {"back_text_a": item.text_a, "back_text_b": item.text_b}
    if isinstance(item, Sentence):
        return {"back_words": list(item.words)}
    assert isinstance(item, Question)
    answers = {"back_answers": _answers(item)} if item.answers else {}
    return {"back_question": item.question, "back_context": item.context, **answers}
