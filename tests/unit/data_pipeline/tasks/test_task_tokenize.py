"""tasks/tokenize.py, windows.py: no word lost, the tokenizer's special tokens, windows as in SQuAD's scripts."""

from __future__ import annotations

import copy
import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from small_encoders import TOKENIZERS, WORDS, sentence, unigram, wordpiece

from data_pipeline.records import DataError, Example
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.tokenize import EncodedSide, TaskTokenizer

LABELS = ("A", "B")
LANGUAGES = tuple(WORDS)


@pytest.fixture(params=["wordpiece", "unigram"])
def hf(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def make(hf: Any, kind: str, length: int, **options: Any) -> TaskTokenizer:
    labels = LABELS if kind in ("classification", "tagging") else ()
    return TaskTokenizer(hf, TaskConfig(kind=kind, labels=labels, **options), length)


def pieces(hf: Any, ids: Any) -> str:
    """The tokens joined, without the marks of word starts."""
    tokens = hf.convert_ids_to_tokens([int(number) for number in ids])
    return "".join(token.removeprefix("##").replace("▁", "") for token in tokens)


def specials(hf: Any, ids: Any) -> list[int]:
    return [int(number) for number in ids if number in (hf.cls_token_id, hf.sep_token_id)]


# --- classification


@pytest.mark.parametrize("length", [8, 9, 13, 20, 21, 40, 200])
@pytest.mark.parametrize("pair", [False, True])
def test_special_tokens_and_truncation_are_those_of_the_tokenizer(hf: Any, length: int, pair: bool) -> None:
    tokenizer = make(hf, "classification", length)
    for first in LANGUAGES:
        for second in LANGUAGES if pair else [""]:
            texts = (sentence(first), sentence(second)[: 3 * len(second) ** 2]) if pair else (sentence(first),)
            side = tokenizer.windows(Example(texts, label="A"))[0]
            expected = hf(*texts, truncation="longest_first", max_length=length)
            assert side.input_ids.tolist() == expected["input_ids"]
            if "token_type_ids" in expected:
                assert side.token_type_ids.tolist() == expected["token_type_ids"]
            assert len(side) <= length
            assert side.content.sum() == len(side) - len(specials(hf, side.input_ids))
            assert (side.word_of_token == -1).all()
            assert side.span is None
            assert len(tokenizer.windows(Example(texts))) == 1


def test_the_longer_text_is_truncated_first(hf: Any) -> None:
    """The tokenizer's own rule, with both texts in both orders and of every length."""
    text = sentence("en")
    for cut in range(1, 40, 4):
        for texts in ((text[:cut], text), (text, text[:cut])):
            side = make(hf, "classification", 24).windows(Example(texts))[0]
            assert side.input_ids.tolist() == hf(*texts, truncation="longest_first", max_length=24)["input_ids"]


def test_a_special_token_that_is_spelled_out_is_text(hf: Any) -> None:
    tokenizer = make(hf, "classification", 100)
    for token in (hf.sep_token, hf.mask_token, hf.cls_token, hf.pad_token):
        text = f"the {token} bridge"
        side = tokenizer.windows(Example((text,)))[0]
        if hf is wordpiece():
            assert side.input_ids.tolist() == hf(text, split_special_tokens=True)["input_ids"]
        assert specials(hf, side.input_ids) == [hf.cls_token_id, hf.sep_token_id]
        assert not {hf.mask_token_id, hf.pad_token_id} & set(side.input_ids.tolist())


def test_a_text_that_the_tokenizer_drops_becomes_the_unknown_token(hf: Any) -> None:
    side = make(hf, "classification", 20).windows(Example(("\u200b\x07" if hf is wordpiece() else "\u3000 ",)))[0]
    assert side.input_ids.tolist() == [hf.cls_token_id, hf.unk_token_id, hf.sep_token_id]


# --- tagging


def slow_words(hf: Any, words: tuple[str, ...]) -> list[list[int]]:
    """Each word tokenised by itself; the unknown token if it has no tokens."""
    return [hf(word, add_special_tokens=False)["input_ids"] or [hf.unk_token_id] for word in words]


def check_words(hf: Any, tokenizer: TaskTokenizer, words: tuple[str, ...]) -> list[EncodedSide]:
    """Every word is whole in at least one window, with exactly its own tokens, and windows are in order."""
    sides = list(tokenizer.windows(Example(words)))
    expected = slow_words(hf, words)
    seen: dict[int, list[int]] = {}
    for side in sides:
        assert len(side) <= tokenizer.sequence_length
        assert side.input_ids[0] == hf.cls_token_id
        assert side.input_ids[-1] == hf.sep_token_id
        assert side.word_of_token[[0, -1]].tolist() == [-1, -1]
        inner = side.word_of_token[1:-1].tolist()
        assert inner == sorted(inner)
        assert sorted(set(inner)) == list(range(*side.words)), "exactly the words of the window have tokens"
        for word in range(*side.words):
            tokens = side.input_ids[side.word_of_token == word].tolist()
            assert tokens == expected[word][: tokenizer.sequence_length - 2]
            seen[word] = tokens
    assert sorted(seen) == list(range(len(words)))
    assert all(a.words < b.words for a, b in pairwise(sides))
    return sides


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("length", "stride"), [(200, 128), (40, 20), (20, 128), (20, 5), (12, 3), (8, 1)])
def test_every_word_is_in_a_window_with_its_own_tokens(hf: Any, language: str, length: int, stride: int) -> None:
    words = WORDS[language] * 3
    sides = check_words(hf, make(hf, "tagging", length, doc_stride=stride), words)
    assert (len(sides) == 1) == (sum(map(len, slow_words(hf, words))) <= length - 2)
    joined = {
        word: pieces(hf, side.input_ids[side.word_of_token == word]) for side in sides for word in range(*side.words)
    }
    for number, word in enumerate(words):
        if len(slow_words(hf, words)[number]) <= length - 2 and hf.unk_token not in joined[number]:
            assert joined[number] == word


def test_both_tokenizers_cover_all_scripts(hf: Any) -> None:
    """Otherwise the test above would compare unknown tokens."""
    for words in WORDS.values():
        assert all(hf.unk_token_id not in ids for ids in slow_words(hf, words))


def test_words_without_tokens_keep_their_place(hf: Any) -> None:
    """First, last and consecutive ones, and white space."""
    dropped = "\u200b" if hf is wordpiece() else "\u3000"
    words = (dropped, "old", dropped, " ", "bridge", "\u00a0", "war", dropped, dropped)
    for length in (100, 6):
        check_words(hf, make(hf, "tagging", length, doc_stride=3), words)
    side = make(hf, "tagging", 100).windows(Example(words))[0]
    lost = [number for number, word in enumerate(words) if not hf(word, add_special_tokens=False)["input_ids"]]
    assert len(lost) >= 4, "the tokenizer drops them"
    for number in lost:
        assert side.input_ids[side.word_of_token == number].tolist() == [hf.unk_token_id]


def test_only_words_longer_than_a_window_are_truncated(hf: Any) -> None:
    words = ("old", "bridgebridgewar" * 5, "war", "old")
    sides = check_words(hf, make(hf, "tagging", 10, doc_stride=4), words)
    assert any(side.words == (1, 2) for side in sides)


@pytest.mark.parametrize("seed", range(20))
def test_windows_of_random_sentences(hf: Any, seed: int) -> None:
    rng = random.Random(seed)
    pool = [word for words in WORDS.values() for word in words] + ["\u200b", "\u3000", "bridge" * 9]
    words = tuple(rng.choices(pool, k=rng.randint(1, 60)))
    check_words(hf, make(hf, "tagging", rng.randint(8, 60), doc_stride=rng.randint(1, 60)), words)


def test_windows_overlap_where_the_stride_is_shorter(hf: Any) -> None:
    words = WORDS["en"] * 4
    apart = make(hf, "tagging", 30, doc_stride=128).windows(Example(words))
    assert all(a[1] == b[0] for a, b in pairwise(apart.ranges)), "no word is in two windows"
    close = make(hf, "tagging", 30, doc_stride=10).windows(Example(words))
    assert all(a[1] > b[0] for a, b in pairwise(close.ranges))


# --- question answering


def question_example(language: str, repeats: int, answer: str | None = None, question: str = "en") -> Example:
    context = " ".join([sentence(language)] * repeats)
    answers = None if answer is None else ((answer, context.rindex(answer)),)
    return Example((sentence(question), context), answers=answers)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("length", "stride", "most"), [(90, 20, 64), (60, 12, 20), (34, 5, 10), (400, 128, 64)])
def test_windows_start_a_stride_apart_as_in_squad(hf: Any, language: str, length: int, stride: int, most: int) -> None:
    """Compared with the tokenizer's overflowing windows, whose `stride` is the overlap."""
    example = question_example(language, 5)
    sides = list(make(hf, "qa", length, doc_stride=stride, max_question_length=most).windows(example))
    question_ids = hf(example.texts[0], add_special_tokens=False)["input_ids"][:most]
    context_ids = hf(example.texts[1], add_special_tokens=False)["input_ids"]
    cls, sep = hf.cls_token_id, hf.sep_token_id
    parts = [[cls], [sep] if hf is wordpiece() else [sep, sep], [sep]]
    room = length - len(question_ids) - sum(map(len, parts))
    expected, start = [], 0
    while True:
        expected.append(context_ids[start : start + room])
        if start + room >= len(context_ids):
            break
        start += min(stride, room)
    assert [side.input_ids.tolist() for side in sides] == [
        [*parts[0], *question_ids, *parts[1], *window, *parts[2]] for window in expected
    ]
    if len(question_ids) < most:
        own = hf(
            *example.texts, truncation="only_second", max_length=length, stride=room - stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        assert [side.input_ids.tolist() for side in sides] == own["input_ids"]
        if "token_type_ids" in own:
            assert [side.token_type_ids.tolist() for side in sides] == own["token_type_ids"]
    for number, side in enumerate(sides):
        assert side.words == (number * stride, number * stride + len(expected[number]))


ANSWERS = {
    "en": ("Budapest", "1949", "rebuilt ( 1949 )"), "th": ("บูดาเปสต์", "สร้าง"), "zh": ("布达佩斯", "战后"),
    "ar": ("الجسر القديم", "بودابست"), "bn": ("বুদাপেস্টের", "সেতুটি"),
}  # fmt: skip


@pytest.mark.parametrize(("language", "answer"), [(code, text) for code, texts in ANSWERS.items() for text in texts])
def test_the_span_decodes_back_to_the_answer(hf: Any, language: str, answer: str) -> None:
    example = question_example(language, 6, answer)
    context = example.texts[1]
    assert example.answers is not None
    start = example.answers[0][1]
    tokenizer = make(hf, "qa", 110, doc_stride=30)
    sides = list(tokenizer.windows(example))
    assert len(sides) > 1
    whole = make(hf, "qa", 2000, doc_stride=30).windows(example)[0]
    assert whole.context_offsets is not None
    of_context = [pair for pair in whole.context_offsets.tolist() if pair != [-1, -1]]
    needed = {n for n, (begin, stop) in enumerate(of_context) if begin < start + len(answer) and stop > start}
    holding = 0
    for side in sides:
        assert side.span is not None
        assert side.context_offsets is not None
        if side.span == (0, 0):
            assert not needed <= set(range(*side.words)), "only a window without the whole answer is without a span"
            continue
        holding += 1
        first, last = side.span
        begin, stop = side.context_offsets[first][0], side.context_offsets[last][1]
        assert answer in context[begin:stop]
        assert begin <= start < begin + 6
        assert stop - len(answer) - start < 6, "no more than the tokens at its ends reach beyond it"
        assert context[begin:stop].strip() == context[begin:stop]
        if hf is wordpiece() or language != "en":
            assert context[begin:stop] == answer
    assert holding >= 1


def test_offsets_name_the_characters_of_each_token_without_space(hf: Any) -> None:
    example = Example((sentence("en"), f"  {sentence('en')}\n\n {sentence('bn')}\t\u3000"))
    side = make(hf, "qa", 400).windows(example)[0]
    assert side.context_offsets is not None
    context = example.texts[1]
    for token, (start, stop) in zip(side.input_ids, side.context_offsets.tolist(), strict=True):
        if start == -1:
            assert stop == -1
        else:
            assert pieces(hf, [token]) in (context[start:stop], ""), "or the space in front of it, as a token"
    inside = np.flatnonzero(side.context_offsets[:, 0] >= 0)
    assert inside.tolist() == list(range(inside[0], inside[-1] + 1)), "one run: the context"
    assert len(inside) == side.words[1] - side.words[0]
    covered = {at for start, stop in side.context_offsets[inside].tolist() for at in range(start, stop)}
    assert covered == {at for at, character in enumerate(context) if not character.isspace()}


def test_offsets_exclude_spaces_that_the_tokenizer_includes_in_words() -> None:
    """As tokenizers do whose pieces can begin with the space before a word."""
    from tokenizers.pre_tokenizers import Metaspace

    hf = copy.deepcopy(unigram())
    hf.backend_tokenizer.pre_tokenizer = Metaspace()
    context = "the old  bridge in Budapest"
    own = hf(context, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert any(context[start:stop].startswith(" ") for start, stop in own)
    side = make(hf, "qa", 400).windows(Example(("old ?", context), answers=(("bridge in", 9),)))[0]
    assert side.context_offsets is not None
    assert side.span is not None
    for start, stop in side.context_offsets.tolist():
        assert start == -1 or context[start:stop] == context[start:stop].strip()
    first, last = side.span
    assert context[side.context_offsets[first][0] : side.context_offsets[last][1]] == "bridge in"


def test_space_around_an_answer_is_ignored_and_one_without_tokens_has_no_span(hf: Any) -> None:
    tokenizer = make(hf, "qa", 400)
    texts = ("old ?", "the old bridge in Budapest")
    plain = tokenizer.windows(Example(texts, answers=(("old bridge", 4),)))[0]
    spaced = tokenizer.windows(Example(texts, answers=((" old bridge ", 3),)))[0]
    assert spaced.span == plain.span != (0, 0)
    assert tokenizer.windows(Example(texts))[0].span is None
    dropped = "\u200b" if hf is wordpiece() else "\u3000"
    context = f"the old {dropped} bridge"
    assert tokenizer.windows(Example(("old ?", context), answers=((dropped, 8),)))[0].span is None


def test_the_first_answer_is_used(hf: Any) -> None:
    tokenizer = make(hf, "qa", 400)
    texts = ("old ?", "the old bridge in Budapest")
    one, two = (("in", 15),), (("in", 15), ("old", 4))
    assert (
        tokenizer.windows(Example(texts, answers=two))[0].span == tokenizer.windows(Example(texts, answers=one))[0].span
    )


# --- texts without labels


@pytest.mark.parametrize("length", [8, 17, 500])
def test_windows_of_a_text_are_its_consecutive_parts(hf: Any, length: int) -> None:
    text = " ".join(map(sentence, LANGUAGES))
    sides = list(make(hf, "text", length).windows(Example((text,))))
    inner = [number for side in sides for number in side.input_ids[1:-1].tolist()]
    assert inner == hf(text, add_special_tokens=False)["input_ids"]
    assert all(len(side) == length for side in sides[:-1])
    assert all(side.content.tolist() == [False] + [True] * (len(side) - 2) + [False] for side in sides)


# --- errors


def test_a_tokenizer_that_is_slow_or_not_an_encoders_is_refused(hf: Any, tmp_path: Any) -> None:
    from transformers import LlamaTokenizer

    decoder = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[])
    with pytest.raises(DataError, match=r"tokenizer '.*' has no cls_token; use an encoder's, or train one with style"):
        make(decoder, "classification", 20)
    decoder.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<unk>"})
    with pytest.raises(DataError, match=r"does not put <s> before a text and </s> after it"):
        make(decoder, "classification", 20)

    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(DataError, match=r"tokenizer 'slow' is not a fast tokenizer"):
        make(Slow(), "classification", 20)


def test_text_needs_a_mask_token() -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    tokenizer.mask_token = None
    make(tokenizer, "classification", 20)
    with pytest.raises(DataError, match="has no mask_token"):
        make(tokenizer, "text", 20)


def test_a_sequence_length_that_is_too_short_is_refused(hf: Any) -> None:
    overhead = (
        len(hf("a", "a", add_special_tokens=True)["input_ids"])
        - len(hf("a", add_special_tokens=False)["input_ids"]) * 2
    )
    make(hf, "qa", overhead + 64 + 128)
    with pytest.raises(DataError, match=rf"data.sequence_length: {overhead + 191} leaves 127 tokens for a context"):
        make(hf, "qa", overhead + 64 + 127)
    with pytest.raises(DataError, match=r"data.sequence_length: 30 leaves 0 tokens"):
        make(hf, "qa", 30)
    make(hf, "tagging", overhead + 2)
    with pytest.raises(DataError, match=rf"is too short; it must be at least {overhead + 2}"):
        make(hf, "tagging", overhead + 1)


# --- serialization and threads


def test_a_task_tokenizer_can_be_restored_from_json(hf: Any) -> None:
    tokenizer = make(hf, "qa", 60, doc_stride=9, max_question_length=11)
    saved = json.loads(json.dumps(tokenizer.config.model_dump(mode="json")))  # as an export holds it
    again = TaskTokenizer(hf, TaskConfig(**saved), 60)
    assert (again.config, again.sequence_length) == (tokenizer.config, 60)
    example = question_example("bn", 5)
    assert [s.input_ids.tolist() for s in again.windows(example)] == [
        s.input_ids.tolist() for s in tokenizer.windows(example)
    ]


def test_threads_and_truncation_of_the_shared_tokenizer_change_nothing(hf: Any) -> None:
    tokenizer = make(hf, "tagging", 40, doc_stride=10)
    examples = [Example(WORDS[language] * repeats) for language in LANGUAGES for repeats in range(1, 6)]
    expected = [[side.input_ids.tolist() for side in tokenizer.windows(example)] for example in examples]
    hf(sentence("en"), truncation=True, max_length=5, padding="max_length")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: [side.input_ids.tolist() for side in tokenizer.windows(each)], examples * 4))
    assert found == expected * 4


def test_only_the_wordpiece_tokenizer_has_token_types() -> None:
    assert make(wordpiece(), "classification", 20).has_token_types
    assert not make(unigram(), "classification", 20).has_token_types
