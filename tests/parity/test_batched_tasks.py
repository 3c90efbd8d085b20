"""Examples of an encoder's tasks tokenised together equal the slow way: one text at a time, one character at a time."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
from small_encoders import TOKENIZERS, WORDS
from tokenizers import Tokenizer

from data_pipeline.config import TaskKind
from data_pipeline.order.pairing import Partner
from data_pipeline.order.plan import FILL, Slot
from data_pipeline.reader import SlotRecord
from data_pipeline.records import BadRow, Example, Record
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.sample import TaskSample
from data_pipeline.tasks.stage import TaskStage
from data_pipeline.tasks.tokenize import EncodedSide, TaskTokenizer
from data_pipeline.tasks.windows import with_marks, without_space

KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
LABELS = ("A", "B", "C")
ODD = ["<s>", "[SEP]", "</s>", "\u200b", "e\u0301", "\u0301", "क्षि", "\u3000", " \n\t", "👩‍👩‍👧", "ﬁ", "\x07", "İ", "2"]


def config(kind: TaskKind) -> TaskConfig:
    labels = LABELS if kind in ("classification", "tagging") else ()
    strides = {"doc_stride": 9} if kind in ("tagging", "qa") else {}
    return TaskConfig(kind=kind, labels=labels, **strides, **({"max_question_length": 6} if kind == "qa" else {}))


def make(hf: Any, kind: TaskKind, length: int = 40) -> TaskTokenizer:
    return TaskTokenizer(hf, config(kind), length)


def example(kind: TaskKind, rng: random.Random, gold: bool = True) -> Example:
    """Words of a few scripts among characters that tokenizers drop, compose or reserve."""
    own = [word for language in rng.sample(list(WORDS), 2) for word in WORDS[language]]
    words = [rng.choice(ODD) if rng.random() < 0.25 else rng.choice(own) for _ in range(rng.randint(1, 60))]
    text = "".join(word + rng.choice([" ", "", "  "]) for word in words)
    text = text if text.strip() else text + "x"
    if kind == "tagging":
        return Example(tuple(words), tags=tuple(rng.choice(LABELS) for _ in words) if gold else None)
    if kind == "classification":
        texts = (text, " ".join(words)) if rng.random() < 0.5 else (text,)
        return Example(texts, label=rng.choice(LABELS))
    if kind == "qa":
        start = rng.randrange(len(text))
        answer = text[start : start + rng.randint(1, 9)]
        return Example((" ".join(words[:9]) or "?", text), answers=((answer, start),) if gold else None)
    return Example((text,))


class Slow:
    """Tokens of one text, by `Tokenizer.encode`."""

    def __init__(self, hf: Any) -> None:
        self.backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.unknown, self.special = hf.unk_token_id, set(hf.all_special_ids)

    def ids(self, text: str) -> list[int]:
        found = self.backend.encode(text, add_special_tokens=False).ids
        return [self.unknown if token in self.special else token for token in found] or [self.unknown]

    def ids_of_words(self, words: tuple[str, ...]) -> list[list[int]]:
        encoding = self.backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        found: list[list[int]] = [[] for _ in words]
        for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
            found[word].append(self.unknown if token in self.special else token)
        return [tokens or [self.unknown] for tokens in found]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return slow_marks(
            slow_trim(self.backend.encode(text, add_special_tokens=False).offsets or [(0, 0)], text), text
        )


def slow_trim(offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    trimmed = []
    for start, stop in offsets:
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and text[stop - 1].isspace():
            stop -= 1
        trimmed.append((start, stop))
    return trimmed


def slow_marks(offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    covered = {place for start, stop in offsets for place in range(start, stop)}
    found = []
    for start, stop in offsets:
        while start < stop < len(text) and stop not in covered and unicodedata.category(text[stop])[0] == "M":
            stop += 1
        found.append((start, stop))
    return found


def texts_of(side: EncodedSide) -> list[list[int]]:
    """The ids of each of the window's texts."""
    runs: list[list[int]] = [[]]
    for token, content in zip(side.input_ids.tolist(), side.content.tolist(), strict=True):
        if content:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return runs[:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_batch_equal_those_of_single_texts(name: str, kind: TaskKind) -> None:
    hf, rng = TOKENIZERS[name](), random.Random(f"{name} {kind}")
    slow = Slow(hf)
    whole = make(hf, kind, 3000)
    examples = [example(kind, rng) for _ in range(80)]
    for each, windows in zip(examples, whole.windows_of_all(examples), strict=True):
        (side,) = windows
        if kind == "tagging":
            words = slow.ids_of_words(each.texts)
            assert texts_of(side) == [[token for word in words for token in word]]
            inside = side.word_of_token[side.content].tolist()
            assert inside == [number for number, word in enumerate(words) for _ in word]
        elif kind == "qa":
            assert texts_of(side) == [slow.ids(each.texts[0])[:6], slow.ids(each.texts[1])]
            assert side.context_offsets is not None
            expected = slow.offsets(each.texts[1])
            inside = side.context_offsets[side.context_offsets[:, 0] >= 0].tolist()
            assert inside == [list(pair) for pair in expected]
            (answer, start), first = (each.answers or ())[0], len(side) - len(expected) - 1
            tokens = [n for n, (a, b) in enumerate(expected) if a < start + len(answer) and b > start and a < b]
            assert side.span == ((first + tokens[0], first + tokens[-1]) if tokens else None)
        else:
            assert texts_of(side) == [slow.ids(text) for text in each.texts]
    cut = make(hf, kind)
    assert plain([list(each) for each in cut.windows_of_all(examples)]) == plain(
        [list(cut.windows(each)) for each in examples]
    )
    assert kind == "classification" or max(map(len, cut.windows_of_all(examples))) > 2


def plain(value: Any) -> Any:
    """Values that compare by content: arrays as lists with their type."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, BadRow):
        return str(value)
    return [plain(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_batch_equal_single_ones(kind: TaskKind) -> None:
    """With every kind of partner, rows without labels, texts that no tokenizer takes, and long ones."""
    rng = random.Random(kind)
    stage = TaskStage(make(TOKENIZERS["unigram"](), kind), "drop" if kind == "classification" else "truncate")
    items = []
    for number in range(120):
        record = Record(f"i{number}", f"g{number}", "th", f"f:{number}", example(kind, rng, gold=number % 7 > 0))
        record = replace(record, back=example(kind, rng, gold=False))
        named = ("translation", "back-translation", "itself", None)[number % 4]
        partner = None if named is None else Partner(named, 0, 0, number % 3 > 0)
        other = Record("o", "o", "en", f"o:{number}", example(kind, rng)) if named == "translation" else None
        if number == 50:
            record = replace(
                record, content=replace(record.example, texts=("\ud800",) * len(record.texts), tags=("A",))
            )
        items.append(SlotRecord(Slot(FILL, number, 1, True, partner, (3, number % 5)), record, other))
    singly = [stage.samples([item])[0] for item in items]
    valid = [*range(50), *range(51, 120)]
    assert plain(stage.samples([items[number] for number in valid])) == plain([singly[number] for number in valid])
    found = stage.samples(items)  # one by one, as number 50 cannot be encoded
    assert plain(found) == plain(singly)
    assert str(found[50]) == "f:50: the text is not valid Unicode: it holds half a surrogate pair"
    bad = sum(isinstance(each, BadRow) for each in found)
    assert bad > 5 if kind in ("tagging", "qa") else bad == 1
    kept = [each for each in found if isinstance(each, TaskSample)]
    assert len({each.source is not None and each.source.is_gold for each in kept}) == 2
    assert (None in found) is (kind == "classification")


def test_trimmed_and_extended_offsets_equal_loops_over_characters() -> None:
    rng = random.Random(0)
    alphabet = "ab \n\u3000\u0301\u0e31क\u093fé\u2028👩\u200d"
    extended = 0
    for _ in range(3000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 14)))
        places = sorted(rng.choices(range(len(text) + 1), k=2 * rng.randint(1, 6)))
        offsets = list(zip(places[::2], places[1::2], strict=True))
        if rng.random() < 0.3:
            rng.shuffle(offsets)
        array = np.array(offsets, np.int32)
        trimmed, marked = without_space(array, text), with_marks(array, text)
        assert [tuple(pair) for pair in trimmed.tolist()] == slow_trim(offsets, text)
        assert [tuple(pair) for pair in marked.tolist()] == slow_marks(offsets, text)
        assert trimmed.dtype == marked.dtype == np.int32
        extended += marked.tolist() != array.tolist()
    assert extended > 300
