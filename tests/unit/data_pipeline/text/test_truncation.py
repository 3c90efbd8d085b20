"""Overlong conversations are truncated: as the template allows, in ten languages, from the left, never in an answer."""

from dataclasses import replace
from unicodedata import category

import numpy as np
import pytest
from small_tokenizers import CUSTOM, ITEMS, KINDS, LANGUAGES, TEMPLATES, check_sample
from test_chat import make_chat, make_record, spans, with_turns
from test_chat import tokenizers as tokenizers

from data_pipeline.records import Message
from data_pipeline.text.truncation import truncate

LONG = 5  # questions of this many repetitions


def cut(chat, record, most, **options):
    return truncate(chat, record, chat.tokenize(record, **options), most, **options)


def users_words(record):
    return [message.content for message in record.conversation.messages if message.role == "user"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_truncated_sample_is_the_template_applied_to_the_end_of_the_question(tokenizers, kind, template, language):
    chat = make_chat(tokenizers, kind, template)
    question, answer = ITEMS[language]
    record = make_record(" ".join([question] * LONG), answer, language=language)
    whole = chat.tokenize(record)
    most = len(whole) - int(whole.content.sum()) // 2
    shorter, sample = cut(chat, record, most)
    assert most - 8 <= len(sample) <= most, "it fits, and uses the available length"
    assert sample.truncated
    assert not whole.truncated
    check_sample(chat, shorter, sample)
    end = chat.decode([chat.template.end_id])
    assert spans(chat, sample, sample.labels) == [answer + end]
    (left,) = users_words(shorter)
    assert record.conversation.messages[0].content.endswith(left)
    assert category(left[0])[0] not in "MZ", "it begins with a written character"
    prompt, content = chat.prompt_ids(shorter.conversation.messages[:-1], language, language)
    assert np.array_equal(sample.input_ids[: len(prompt)], prompt), "it begins with the prompt of generation"
    assert np.array_equal(sample.content[: len(prompt)], content)
    header = int(np.flatnonzero(whole.content)[0]) - 1
    assert np.array_equal(sample.input_ids[:header], whole.input_ids[:header]), "the template's tokens are complete"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
def test_a_sample_that_fits_is_unchanged(tokenizers, template):
    chat, record = make_chat(tokenizers, "spm", template), make_record(*ITEMS["en"])
    sample = chat.tokenize(record)
    kept, same = truncate(chat, record, sample, len(sample))
    assert kept is record
    assert np.array_equal(same.input_ids, sample.input_ids)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
def test_the_oldest_turn_is_truncated_first_and_no_answer(tokenizers, template):
    """The first question is truncated to its last token before the second one; the system message stays whole."""
    chat = make_chat(tokenizers, "bytes", template)
    old, new = " ".join([ITEMS["en"][0]] * 3), ITEMS["de"][0]
    record = make_record(("system", "Be brief."), old, "First 41.", new, "Then 42.")
    whole = chat.tokenize(record)
    shorter, sample = cut(chat, record, len(whole) - 20)
    check_sample(chat, shorter, sample)
    first, last = users_words(shorter)
    assert old.endswith(first)
    assert first != old
    assert last == new
    assert shorter.conversation.messages[0].content == "Be brief."
    words = [chat.decode(sample.input_ids[a:b]) for a, b in runs(sample.answer)]
    assert words == ["First 41.", "Then 42."]
    shorter, sample = cut(chat, record, len(whole) - len(chat.token_starts(old)) - 4)
    first, last = users_words(shorter)
    assert len(chat.token_starts(first)) == 1, "it keeps its last token"
    assert new.endswith(last)
    assert last != new


def runs(mask):
    return np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)


@pytest.mark.parametrize("template", [{"name": "chat"}, {"name": "custom", "prompt": CUSTOM}], ids=lambda t: t["name"])
def test_a_long_system_message_is_truncated_before_a_short_question(tokenizers, template):
    chat = make_chat(tokenizers, "bytes", template)
    rules = " ".join(f"Rule {number}: be brief." for number in range(20))
    record = make_record(("system", rules), *ITEMS["en"])
    shorter, sample = cut(chat, record, len(chat.tokenize(record)) // 2)
    check_sample(chat, shorter, sample)
    assert users_words(shorter) == [ITEMS["en"][0]]
    assert rules.endswith(shorter.conversation.messages[0].content)
    record = make_record(("system", "Be brief."), " ".join([ITEMS["en"][0]] * LONG), ITEMS["en"][1])
    shorter, _ = cut(chat, record, len(chat.tokenize(record)) // 2)
    assert shorter.conversation.messages[0].content == "Be brief.", "a short one stays"


def test_an_untrained_answer_is_truncated_like_the_prompt(tokenizers):
    chat = make_chat(tokenizers, "bytes", {"name": "chat"})
    record = make_record("Hi", "word " * 40 + "end", "And 12 + 30?", "42")
    turns = list(record.conversation.messages)
    turns[1] = replace(turns[1], trained=False)
    record = with_turns(record, *turns)
    shorter, sample = cut(chat, record, len(chat.tokenize(record)) - 15)
    check_sample(chat, shorter, sample)
    assert users_words(shorter)[1] == "And 12 + 30?"
    assert shorter.conversation.messages[1].content != turns[1].content
    assert shorter.conversation.messages[1].content.endswith("word end")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["name"])
def test_a_sample_whose_answer_leaves_no_room_is_not_truncated(tokenizers, template):
    chat = make_chat(tokenizers, "spm", template)
    record = make_record("What is it?", " ".join([ITEMS["en"][1]] * 4))
    answer = int(chat.tokenize(record).labels.sum())
    assert cut(chat, record, answer) is None
    assert cut(chat, record, 4) is None


def test_a_label_free_sample_is_truncated_to_the_same_limit(tokenizers):
    chat = make_chat(tokenizers, "spm", {"name": "chat"})
    _, sample = cut(chat, make_record(" ".join([ITEMS["en"][0]] * LONG), "42"), 60, labelled=False)
    assert 50 < len(sample) <= 60
    assert not sample.labels.any()


def test_truncation_keeps_characters_whole(tokenizers):
    """Byte-level tokens can begin inside a character; a vowel sign belongs to the consonant before it."""
    chat = make_chat(tokenizers, "bytes-bos", {"name": "plain"})
    for text in (ITEMS["bn"][0], ITEMS["th"][0], "\U0001f469\u200d\U0001f527 e\u0301e\u0301 नमस्ते"):
        record = make_record(text * 2, "42")
        whole = len(chat.tokenize(record))
        for most in range(12, whole):
            shorter, sample = cut(chat, record, most) or (record, None)
            left = shorter.conversation.messages[0].content
            assert category(left[0])[0] not in "MZ"
            assert left[0] != "\u200d"
            assert left[0] != "\U0001f527", "the second half of a joined emoji"
            if sample is not None:
                check_sample(chat, shorter, sample)


def test_text_that_spells_a_special_token_stays_text_when_truncated(tokenizers):
    chat = make_chat(tokenizers, "bytes", {"name": "chat"})
    record = make_record("<|im_end|> " * 12 + "how many?", "42")
    whole = len(chat.tokenize(record))
    ends = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for most in range(whole - 40, whole, 3):
        shorter, sample = cut(chat, record, most)
        check_sample(chat, shorter, sample)
        assert (sample.input_ids == ends).sum() == 2, "the template's own"


def test_a_conversation_of_single_tokens_is_not_truncated(tokenizers):
    chat = make_chat(tokenizers, "spm", {"name": "plain"})
    record = with_turns(make_record("?", "42"), Message("user", "?"), Message("assistant", "42"))
    assert cut(chat, record, 1) is None
