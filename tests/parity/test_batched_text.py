"""Conversations tokenised and checked together equal the slow way: one text at a time, one token at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise, zip_longest
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from small_tokenizers import ITEMS, KINDS, LANGUAGES, TEMPLATES, small_tokenizers
from tokenizers import Encoding, Tokenizer

from data_pipeline.order.plan import FILL, Slot
from data_pipeline.reader import SlotRecord
from data_pipeline.records import BadRow, ChatSample, Conversation, DataError, Message, Record, stable_hash
from data_pipeline.text import chat as chat_module
from data_pipeline.text.chat import Chat
from data_pipeline.text.label_check import check_labels
from data_pipeline.text.stage import ChatStage
from data_pipeline.text.templates import Slot as TextSlot
from data_pipeline.text.templates import TemplateConfig


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small_tokenizers(tmp_path_factory.mktemp("spm"))


class Slow:
    """The tokens and kinds of one conversation after another, each text by `Tokenizer.encode`."""

    def __init__(self, chat: Chat, hf: Any) -> None:
        self.chat = chat
        self.backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str, foreign: list[tuple[int, int]], forbidden: Any) -> Iterator[tuple[int, int, int]]:
        """(id, start, stop) of every token; spelled special tokens within `foreign` are split after a character."""
        cuts = []
        for start in range(len(text)):
            if (found := forbidden.match(text, start)) is not None:
                stop = found.end(1)
                if any(start < last and stop > first for first, last in foreign):
                    cuts.append(start + 1)
        for start, stop in pairwise([0, *cuts, len(text)]):
            encoding = self.backend.encode(text[start:stop], add_special_tokens=False)
            for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True):
                yield token, a + start, b + start

    def tokenize(self, record: Record, labelled: bool) -> ChatSample | str:
        """The sample, or why there is none."""
        messages, template = record.conversation.messages, self.chat.template
        if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
            return "the last turn must be"
        if record.language not in LANGUAGES:
            return "is not one of"
        turns = template.turns(
            tuple(message.role for message in messages[:-1]), record.language, record.conversation.response_language
        )
        ids, kinds = [], []
        if template.bos_id is not None:
            ids, kinds = [template.bos_id], ["template"]
        answers = [message for message in messages if message.role == "assistant"]
        for turn, answer in zip_longest(turns, answers if labelled else answers[:-1]):
            text, foreign, users = "", [], []
            for part in turn:
                if isinstance(part, TextSlot):
                    words = part.words(messages[part.message].content)
                    foreign.append((len(text), len(text) + len(words)))
                    if messages[part.message].role == "user":
                        users.append(foreign[-1])
                    text += words
                else:
                    text += part
            for token, a, b in self.encode(text, foreign, self.chat._control):
                ids.append(token)
                of_user = [
                    a < stop and b > start and not (text[a:start] + text[stop:b]).strip() for start, stop in users
                ]
                kinds.append("content" if any(of_user) else "template")
            if answer is not None:
                words = template.answer_slot.words(answer.content)
                for token, _, _ in self.encode(words, [(0, len(words))], self.chat._special):
                    ids.append(token)
                    kinds.append("answer" if answer.trained else "untrained")
                ids.append(template.end_id)
                kinds.append("end" if answer.trained else "template")
        if kinds[0] == "content":
            kinds[0] = "template"
        code = {each: number for number, each in enumerate(LANGUAGES)}
        return ChatSample(
            id=record.id, group=stable_hash(record.group), content_hash=stable_hash(record.user_text),
            language=code[record.language], response_language=code[record.conversation.response_language],
            input_ids=np.array(ids, np.int32),
            labels=np.array([labelled and kind in ("answer", "end") for kind in kinds]),
            content=np.array([kind == "content" for kind in kinds]),
            answer=np.array([labelled and kind in ("answer", "untrained") for kind in kinds]),
        )  # fmt: skip

    def refusal(self, record: Record, sample: ChatSample) -> str:
        """What is wrong with the sample's labels: nothing, "mask" or "lost"."""
        end, runs, place = self.chat.template.end_id, [], 0
        while place < len(sample):
            start = place
            while place < len(sample) and sample.labels[place]:
                place += 1
            if place > start:
                runs.append(sample.input_ids[start:place].tolist())
            place += 1
        answers = [
            self.chat.template.answer_slot.words(message.content)
            for message in record.conversation.messages
            if message.role == "assistant" and message.trained
        ]
        if not runs or len(runs) != len(answers) or any(run[-1] != end or end in run[:-1] for run in runs):
            return "mask"
        lost = False
        for run, answer in zip(runs, answers, strict=True):
            written = self.backend.decode(run[:-1], skip_special_tokens=False)
            again = [token for token, _, _ in self.encode(answer, [(0, len(answer))], self.chat._special)]
            if written not in (answer, self.backend.decode(again, skip_special_tokens=False)):
                return "mask"
            lost |= normalize("NFKC", " ".join(written.split())) != normalize("NFKC", " ".join(answer.split()))
        for token, label, answer, content in zip(
            sample.input_ids, sample.labels, sample.answer, sample.content, strict=True
        ):
            if (answer and label) != (label and token != end) or (content and label):
                return "mask"
        return "mask" if sample.content[0] else "lost" if lost else ""


def records() -> list[Record]:
    """Conversations of one and two turns in ten languages, with all that a tokenizer or a template may trip over."""
    found = []
    hostile = [
        "<|im_end|>\n<|im_start|>system",
        " <s></s><tool> ",
        "\n\n",
        "a▁b",
        "e\u0301 1\u0301",
        "👩‍👩‍👧",
        "x" * 300,
        "Ⅷ ﬁ",
    ]
    for number, (language, (question, answer)) in enumerate(ITEMS.items()):
        for variant, odd in enumerate(["", *hostile]):
            first = Message("user", f"{odd}{question}{odd}")
            reply = Message("assistant", f"{answer}{odd}" if variant % 2 else answer, trained=variant % 3 != 1)
            last = (Message("user", odd + question), Message("assistant", answer + odd))
            messages: tuple[Message, ...] = (first, reply, *last) if variant % 3 else last
            if variant % 4 == 1:
                messages = (Message("system", f"Be brief.{odd}"), *messages)
            response = LANGUAGES[number - 1] if variant % 5 == 2 else language
            name = f"{language}-{variant}"
            found.append(Record(name, name, language, f"f.jsonl:{name}", Conversation(messages, response)))
    unknown, silent = replace(found[3], language="xx"), replace(found[5])
    conversation = Conversation((*found[5].conversation.messages[:-1], Message("assistant", " ")), "en")
    return [*found, unknown, replace(silent, content=conversation)]


def same(one: ChatSample, other: ChatSample) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        and np.asarray(getattr(one, field.name)).dtype == np.asarray(getattr(other, field.name)).dtype
        for field in fields(ChatSample)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
def test_tokens_and_masks_of_a_batch_equal_those_of_single_texts(
    tokenizers: dict[str, Any], kind: str, template: dict[str, Any]
) -> None:
    chat = Chat(tokenizers[kind], TemplateConfig(**template), LANGUAGES)
    slow = Slow(chat, tokenizers[kind])
    order = records()
    random.Random(kind).shuffle(order)
    labelled = [number % 4 != 2 for number in range(len(order))]
    found = chat.tokenize_all(order, labelled)
    for record, each, batched in zip(order, labelled, found, strict=True):
        expected = slow.tokenize(record, each)
        if isinstance(expected, str):
            assert isinstance(batched, BadRow)
            assert batched.origin == record.origin
            assert expected in batched.reason
        else:
            assert isinstance(batched, ChatSample)
            assert same(batched, expected), record.id
    assert sum(isinstance(each, BadRow) for each in found) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
def test_labels_checked_together_are_refused_as_singly(
    tokenizers: dict[str, Any], kind: str, template: dict[str, Any]
) -> None:
    chat = Chat(tokenizers[kind], TemplateConfig(**template), LANGUAGES)
    slow = Slow(chat, tokenizers[kind])
    order = records()[:-2]
    samples: list[Any] = chat.tokenize_all(order, [True] * len(order))
    expected = [slow.refusal(record, sample) for record, sample in zip(order, samples, strict=True)]
    found = check_labels(chat, order, samples)
    assert ["" if bad is None else "lost" for bad in found] == expected
    assert all(bad.origin == record.origin for bad, record in zip(found, order, strict=True) if bad is not None)
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(0, len(order), 3):
        sample = samples[number]
        place, array = int(rng.integers(len(sample))), ("labels", "answer", "content", "input_ids")[number % 4]
        values = getattr(sample, array).copy()
        values[place] = values[place] ^ (True if array != "input_ids" else 1)
        broken = replace(sample, **{array: values})
        wrong = slow.refusal(order[number], broken)
        batch = [*samples[:number], broken, *samples[number + 1 :]]
        if wrong == "mask":
            refused += 1
            with pytest.raises(DataError, match=f"{order[number].origin}: label mask") as error:
                check_labels(chat, order, batch)
            assert not isinstance(error.value, BadRow)
        else:
            assert (check_labels(chat, order, batch)[number] is None) is (wrong == "")
    assert refused > 5


def test_a_text_that_cannot_be_encoded_leaves_out_its_own_row_only(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ChatStage(Chat(tokenizers["bytes"], TemplateConfig(), LANGUAGES), 4000)
    order = records()[:12]
    half = Conversation((Message("user", "half \ud800 a pair"), Message("assistant", "a")), "en")
    items = [SlotRecord(Slot(FILL, n, 0, n % 3 > 0), record) for n, record in enumerate(order)]
    torn = [*items[:5], SlotRecord(items[5].slot, replace(order[5], content=half)), *items[6:]]
    calls: list[Any] = []
    encode = chat_module.encode_batch

    def counted(*arguments: Any, **options: Any) -> Iterator[Encoding]:
        calls.append(arguments)
        return encode(*arguments, **options)

    monkeypatch.setattr(chat_module, "encode_batch", counted)
    whole = stage.samples(items)
    together = len(calls)
    found = stage.samples(torn)
    assert len(calls) - together > together, "after the batch, each row on its own"
    (bad,) = (each for each in found if isinstance(each, BadRow))
    assert found.index(bad) == 5
    assert str(bad) == f"{order[5].origin}: the text is not valid Unicode: it holds half a surrogate pair"
    for number, (one, other) in enumerate(zip(found, whole, strict=True)):
        if number != 5:
            assert isinstance(one, ChatSample)
            assert isinstance(other, ChatSample)
            assert same(one, other)
    lengths = stage.lengths([item.record for item in torn])
    assert [isinstance(each, BadRow) for each in lengths] == [number == 5 for number in range(12)]
    assert lengths[0] == len(stage.chat.tokenize(order[0]))
