"""Tokenises Examples for encoders: long texts in windows, with maps from tokens to words and characters.

Requires a fast tokenizer of an encoder (the families of BERT and XLM-R). Training reads one window of a text per
step; prediction reads all windows.

Special tokens are placed as the tokenizer places them, and text that spells a special token is never encoded as one.
A text or word for which the tokenizer gives no token becomes the unknown token, so that no word is lost.

Shapes: T tokens of a window, special tokens included; words and characters are counted over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.records import DataError, Example
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.windows import (
    Ids,
    Range,
    answer_tokens,
    longest_first,
    strided,
    with_marks,
    without_space,
    word_ranges,
)
from data_pipeline.text.tokenizer import encode_batch, private_backend, token_offsets

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NO_WORD = -1
NO_ANSWER = (0, 0)  # the span of a window without the answer: the first token


@dataclass(frozen=True, slots=True)
class EncodedSide:
    """One window of a text or of a pair of texts."""

    input_ids: Ids  # (T,) token ids
    token_type_ids: npt.NDArray[np.int8]  # (T,) segment of each token
    word_of_token: Ids  # (T,) tagging: the word of each token, -1 if none
    content: npt.NDArray[np.bool_]  # (T,) True for tokens of the texts, False for special tokens
    # tagging: the words of this window, (first, stop); qa: the context's tokens in this window, counted over the
    # whole context, which gives the distance of a token to the window's ends
    words: Range = (0, 0)
    # qa: (first, last) position of the answer's tokens; (0, 0) if they are not all in this window; None without
    # answers, or if no token covers the answer
    span: Range | None = None
    # (T, 2) qa: start and stop of a token in the context, in characters, without white space; -1 outside the context
    context_offsets: Ids | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Windows:
    """The windows of one text, built lazily.

    Attributes:
        ranges: the part of the text in each window.
        uncut: classification: tokens of the window without truncation; otherwise 0, as no token is dropped.
    """

    def __init__(self, ranges: Sequence[Range], make: Callable[[Range], EncodedSide], uncut: int = 0) -> None:
        self.ranges = tuple(ranges)
        self.uncut = uncut
        self._make = make

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> EncodedSide:
        return self._make(self.ranges[number])

    def __iter__(self) -> Iterator[EncodedSide]:
        return map(self._make, self.ranges)

    def nearest_to(self, others: Windows, number: int) -> EncodedSide:
        """The window whose middle is nearest to that of window `number` of `others`, as shares of the two texts."""
        wanted = others._middle(number)
        return self[min(range(len(self)), key=lambda each: abs(self._middle(each) - wanted))]

    def _middle(self, number: int) -> float:
        return sum(self.ranges[number]) / 2 / self.ranges[-1][1]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens around one or two texts: before, between and after them."""

    special: tuple[Ids, ...]
    special_types: tuple[npt.NDArray[np.int8], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.special))

    def around(self, *texts: Ids) -> tuple[dict[str, Any], list[int]]:
        """`input_ids`, `token_type_ids` and `content` of the framed texts, and the start position of each text."""
        ids, types, content = [self.special[0]], [self.special_types[0]], [np.zeros(len(self.special[0]), np.bool_)]
        starts = []
        for number, text in enumerate(texts):
            after, types_after = self.special[number + 1], self.special_types[number + 1]
            starts.append(sum(map(len, ids)))
            ids += [text, after]
            types += [np.full(len(text), self.text_types[number], np.int8), types_after]
            content += [np.ones(len(text), np.bool_), np.zeros(len(after), np.bool_)]
        arrays = {
            "input_ids": np.concatenate(ids),
            "token_type_ids": np.concatenate(types),
            "content": np.concatenate(content),
        }
        return arrays, starts


class TaskTokenizer:
    """Tokenises the examples of one task. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, sequence_length: int) -> None:
        """Raises DataError if the tokenizer lacks a token, or if the length is too short for the task."""
        self.tokenizer = tokenizer
        self.config = config
        self.sequence_length = sequence_length
        self._check_tokens()
        self._backend = private_backend(tokenizer)
        self._single = self._frame("a", None)
        self._pair = self._frame("a", "a")
        self._backend.encode_special_tokens = True  # from here on, text that spells a special token stays text
        self.pad_id = int(tokenizer.pad_token_id)
        self.mask_id = -1 if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)
        special = set(tokenizer.all_special_ids)
        self.ordinary_ids = np.array([number for number in range(len(tokenizer)) if number not in special], np.int32)
        self._unknown = np.int32(tokenizer.unk_token_id)
        # What each id becomes in a text: special ones unknown, as unigram models encode spelled ones as pieces.
        self._text_id = np.arange(max(tokenizer.get_vocab().values()) + 1, dtype=np.int32)
        self._text_id[sorted(special)] = self._unknown
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names
        self._check_length()

    def windows(self, example: Example) -> Windows:
        """See `windows_of_all`."""
        return self.windows_of_all([example])[0]

    def windows_of_all(self, examples: Sequence[Example]) -> list[Windows]:
        """All windows of each example. Except in classification, every word or token is in at least one window.

        classification: one window; of two texts, the longer is truncated first.
        tagging: whole words, as many as fit; the next window starts `doc_stride` tokens later, or earlier if that
            would skip a word. A word longer than a window is truncated.
        qa: the question, truncated to `max_question_length`, followed by a part of the context; window i starts at
            token i * doc_stride of the context, as in the SQuAD baseline scripts.
        text: consecutive parts of the text.

        The examples are tokenised together. Raises UnencodableText.
        """
        if self.config.kind == "classification":
            encoded = self._encode([text for example in examples for text in example.texts])
            return [self._one_window([next(encoded) for _ in example.texts]) for example in examples]
        if self.config.kind == "tagging":
            words = encode_batch(self._backend, [list(example.texts) for example in examples], offsets=True)
            return [self._word_windows(example.texts, next(words)) for example in examples]
        if self.config.kind == "qa":
            questions = self._encode([example.texts[0] for example in examples])
            contexts = encode_batch(self._backend, [example.texts[1] for example in examples], offsets=True)
            return [self._context_windows(example, next(questions), next(contexts)) for example in examples]
        return list(map(self._parts, self._encode([example.texts[0] for example in examples])))

    def _parts(self, ids: Ids) -> Windows:
        room = self.sequence_length - self._single.size
        ranges = [(start, min(start + room, len(ids))) for start in range(0, len(ids), room)]
        return Windows(ranges, lambda part: self._side(self._single, ids[slice(*part)])[0])

    def _one_window(self, parts: Sequence[Ids]) -> Windows:
        frame = self._single if len(parts) == 1 else self._pair
        whole = [len(part) for part in parts]
        lengths = longest_first(whole, self.sequence_length - frame.size)
        cut = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return Windows([(0, 1)], lambda _: self._side(frame, *cut)[0], uncut=frame.size + sum(whole))

    def _word_windows(self, words: tuple[str, ...], encoding: Encoding) -> Windows:
        ids, word_of_token = self._ids_of_words(len(words), encoding)
        room = self.sequence_length - self._single.size
        first_token = np.searchsorted(word_of_token, np.arange(len(words) + 1))

        def side(part: Range) -> EncodedSide:
            tokens = slice(first_token[part[0]], min(first_token[part[1]], first_token[part[0]] + room))
            return self._side(self._single, ids[tokens], word_of_token=word_of_token[tokens], words=part)[0]

        return Windows(word_ranges(first_token, room, self.config.doc_stride), side)

    def _context_windows(self, example: Example, question_ids: Ids, encoding: Encoding) -> Windows:
        context = example.texts[1]
        question_ids = question_ids[: self.config.max_question_length]
        ids, offsets = self._text_ids(encoding), token_offsets(encoding)
        if not len(offsets):  # the one unknown token
            offsets = np.zeros((1, 2), np.int32)
        offsets = with_marks(without_space(offsets, context), context)
        answer = answer_tokens(offsets, example.answers[0]) if example.answers else None
        room = self.sequence_length - self._pair.size - len(question_ids)

        def side(part: Range) -> EncodedSide:
            made, start = self._side(self._pair, question_ids, ids[slice(*part)], words=part)
            shift = start - part[0]
            span = None if answer is None else NO_ANSWER
            if answer is not None and part[0] <= answer[0] and answer[1] < part[1]:
                span = (answer[0] + shift, answer[1] + shift)
            characters = np.full((len(made), 2), -1, np.int32)
            characters[start : start + part[1] - part[0]] = offsets[slice(*part)]
            return replace(made, span=span, context_offsets=characters)

        return Windows(strided(len(ids), room, self.config.doc_stride), side)

    def _side(
        self, frame: _Frame, *texts: Ids, word_of_token: Ids | None = None, words: Range = (0, 0)
    ) -> tuple[EncodedSide, int]:
        """The framed texts, and the start position of the last one."""
        arrays, starts = frame.around(*texts)
        of_word = np.full(len(arrays["input_ids"]), NO_WORD, np.int32)
        if word_of_token is not None:
            of_word[starts[-1] : starts[-1] + len(word_of_token)] = word_of_token
        return EncodedSide(**arrays, word_of_token=of_word, words=words), starts[-1]

    def _encode(self, texts: Sequence[str]) -> Iterator[Ids]:
        """Token ids (n,) of each text, without special tokens."""
        return map(self._text_ids, encode_batch(self._backend, texts))

    def _ids_of_words(self, n_words: int, encoding: Encoding) -> tuple[Ids, Ids]:
        """Token ids (n,) and the word of each token (n,); each word has at least one token."""
        ids, word_of_token = self._text_id[encoding.ids], np.array(encoding.word_ids, np.int32)
        lost = np.flatnonzero(np.bincount(word_of_token, minlength=n_words) == 0)
        places = np.searchsorted(word_of_token, lost)
        return np.insert(ids, places, self._unknown), np.insert(word_of_token, places, lost)

    def _text_ids(self, encoding: Encoding) -> Ids:
        """Token ids (n,) of a text; n is at least 1."""
        return self._text_id[encoding.ids] if len(encoding) else np.array([self._unknown])

    def _frame(self, first: str, second: str | None) -> _Frame:
        """The special tokens that the tokenizer adds around one or two texts, taken from an encoded example."""
        encoding: Encoding = self._backend.encode(first, second)
        runs = [(kind, list(run)) for kind, run in groupby(range(len(encoding.ids)), encoding.sequence_ids.__getitem__)]
        order = [kind for kind, _ in runs]
        wanted = [None, 0, None] if second is None else [None, 0, None, 1, None]
        if order != wanted or encoding.ids[0] != self.tokenizer.cls_token_id:
            raise DataError(
                f"tokenizer {self.tokenizer.name_or_path!r} does not put {self.tokenizer.cls_token} before a text and"
                f" {self.tokenizer.sep_token} after it, as an encoder's does"
            )
        special = [run for kind, run in runs if kind is None]
        return _Frame(
            tuple(np.array([encoding.ids[token] for token in run], np.int32) for run in special),
            tuple(np.array([encoding.type_ids[token] for token in run], np.int8) for run in special),
            tuple(encoding.type_ids[run[0]] for kind, run in runs if kind is not None),
        )

    def _check_tokens(self) -> None:
        name = f"tokenizer {self.tokenizer.name_or_path!r}"
        if not self.tokenizer.is_fast:
            raise DataError(f"{name} is not a fast tokenizer, so it does not map tokens to words")
        needed = ["cls_token", "sep_token", "pad_token", "unk_token"]
        for token in [*needed, "mask_token"] if self.config.kind == "text" else needed:
            if getattr(self.tokenizer, token) is None:
                raise DataError(f"{name} has no {token}; use an encoder's, or train one with style: encoder")

    def _check_length(self) -> None:
        if self.config.kind == "qa":
            room = self.sequence_length - self.config.max_question_length - self._pair.size
            if room < self.config.doc_stride:
                raise DataError(
                    f"data.sequence_length: {self.sequence_length} leaves {max(room, 0)} tokens for a context beside a"
                    f" question of {self.config.max_question_length}, fewer than task.doc_stride"
                    f" ({self.config.doc_stride}); raise it, or lower the others"
                )
        least = self._pair.size + 2
        if self.sequence_length < least:
            raise DataError(f"data.sequence_length: {self.sequence_length} is too short; it must be at least {least}")
