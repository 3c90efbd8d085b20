"""Examples -> tokens: in windows where a text is too long, with what maps tokens back to words and characters.

In: Examples and a fast tokenizer of an encoder (BERT's and XLM-R's families). Out: EncodedSides.
Next: `reader.py` in training; prediction takes all windows of a text.

Special tokens stand where the tokenizer itself puts them. What people wrote never becomes one. A text, or a word
of a sentence, that the tokenizer drops (odd characters) becomes the unknown token, so that no word is lost.

Shapes: T tokens of a window, special tokens included; words and characters are counted over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NO_WORD = -1
NO_ANSWER = (0, 0)  # the span of a window without the answer: the first token


@dataclass(frozen=True, slots=True)
class EncodedSide:
    """One window of one text or pair of texts. All arrays are (T,), `context_offsets` is (T, 2).

    words            tagging: the words in this window, (first, stop); qa: the tokens of the context in it, counted
                     over the whole context, so that the distance of a token to the window's ends is known
    span             qa: (first, last) position of the answer's tokens; (0, 0) if they are not all in this window;
                     None without answers, or where no token stands for the answer
    context_offsets  qa: where in the context a token begins and stops, in characters, without white space; -1 outside
    """

    input_ids: Ids
    token_type_ids: npt.NDArray[np.int8]
    word_of_token: Ids  # tagging: the word; -1 where there is none
    content: npt.NDArray[np.bool_]  # tokens of the texts; not special ones
    words: Range = (0, 0)
    span: Range | None = None
    context_offsets: Ids | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Windows:
    """The windows of one text, each made when it is asked for.

    `uncut`: classification: tokens that the one window would hold, were nothing cut. 0 where all is in some window.
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


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens around one text or two: before, between and behind them."""

    special: tuple[Ids, ...]
    special_types: tuple[npt.NDArray[np.int8], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.special))

    def around(self, *texts: Ids) -> tuple[dict[str, Any], list[int]]:
        """input_ids, token_type_ids and content of the framed texts, and the position where each text begins."""
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
    """One tokenizer for one task. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TaskConfig,
        sequence_length: int,
        languages: Sequence[str] = (),
    ) -> None:
        """`languages` are only kept for `to_dict`. Raises DataError where tokenizer, task and length don't fit."""
        self.tokenizer = tokenizer
        self.config = config
        self.sequence_length = sequence_length
        self.languages = tuple(languages)
        self._check_tokens()
        from tokenizers import Tokenizer

        # A copy of our own: truncation and padding are settings of the shared one, and others change them.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._single = self._frame("a", None)
        self._pair = self._frame("a", "a")
        self._backend.encode_special_tokens = True  # from here on, a special token that is spelled out is text
        self.pad_id = int(tokenizer.pad_token_id)
        self.mask_id = -1 if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)
        special = set(tokenizer.all_special_ids)
        self.ordinary_ids = np.array([number for number in range(len(tokenizer)) if number not in special], np.int32)
        self._unknown = np.int32(tokenizer.unk_token_id)
        self._never_text = np.array(sorted(special - {tokenizer.unk_token_id}), np.int32)
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names
        self._check_length()

    def windows(self, example: Example) -> Windows:
        """All windows of an example: each word and each token of a long text is in at least one.

        classification  one; of two texts, the longer loses tokens first
        tagging         whole words, as many as fit; the next window starts `doc_stride` tokens on, or earlier
                        where that would skip a word. A word longer than a window is cut.
        qa              the question, cut to `max_question_length`, before a part of the context; window i starts at
                        token i * doc_stride of the context, as in the scripts of SQuAD's baselines
        text            parts of the text, one after the other
        """
        if self.config.kind == "classification":
            return self._one_window(example.texts)
        if self.config.kind == "tagging":
            return self._word_windows(example.texts)
        if self.config.kind == "qa":
            return self._context_windows(example)
        ids = self._encode(example.texts[0])[0]
        room = self.sequence_length - self._single.size
        ranges = [(start, min(start + room, len(ids))) for start in range(0, len(ids), room)]
        return Windows(ranges, lambda part: self._side(self._single, ids[slice(*part)])[0])

    def encode(self, example: Example, which_window: int = 0) -> EncodedSide:
        """One window of an example."""
        return self.windows(example)[which_window]

    def to_dict(self) -> dict[str, Any]:
        """What an export keeps, as plain JSON data; `from_dict` reads it."""
        return {
            "task": self.config.model_dump(mode="json"),
            "sequence_length": self.sequence_length,
            "languages": list(self.languages),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> TaskTokenizer:
        return cls(tokenizer, TaskConfig(**saved["task"]), saved["sequence_length"], saved["languages"])

    def _one_window(self, texts: tuple[str, ...]) -> Windows:
        parts = [self._encode(text)[0] for text in texts]
        frame = self._single if len(parts) == 1 else self._pair
        whole = [len(part) for part in parts]
        lengths = longest_first(whole, self.sequence_length - frame.size)
        cut = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return Windows([(0, 1)], lambda _: self._side(frame, *cut)[0], uncut=frame.size + sum(whole))

    def _word_windows(self, words: tuple[str, ...]) -> Windows:
        ids, word_of_token = self._encode_words(words)
        room = self.sequence_length - self._single.size
        first_token = np.searchsorted(word_of_token, np.arange(len(words) + 1))

        def side(part: Range) -> EncodedSide:
            tokens = slice(first_token[part[0]], min(first_token[part[1]], first_token[part[0]] + room))
            return self._side(self._single, ids[tokens], word_of_token=word_of_token[tokens], words=part)[0]

        return Windows(word_ranges(first_token, room, self.config.doc_stride), side)

    def _context_windows(self, example: Example) -> Windows:
        question, context = example.texts
        asked = self._encode(question)[0][: self.config.max_question_length]
        ids, offsets = self._encode(context)
        offsets = with_marks(without_space(offsets, context), context)
        answer = answer_tokens(offsets, example.answers[0]) if example.answers else None
        room = self.sequence_length - self._pair.size - len(asked)

        def side(part: Range) -> EncodedSide:
            made, start = self._side(self._pair, asked, ids[slice(*part)], words=part)
            shift = start - part[0]
            span = None if answer is None else NO_ANSWER
            if answer is not None and part[0] <= answer[0] and answer[1] < part[1]:
                span = (answer[0] + shift, answer[1] + shift)
            characters = np.full((len(made), 2), -1, np.int32)
            characters[start : start + part[1] - part[0]] = offsets[slice(*part)]
            return EncodedSide(
                made.input_ids, made.token_type_ids, made.word_of_token, made.content, part, span, characters
            )

        return Windows(strided(len(ids), room, self.config.doc_stride), side)

    def _side(
        self, frame: _Frame, *texts: Ids, word_of_token: Ids | None = None, words: Range = (0, 0)
    ) -> tuple[EncodedSide, int]:
        """The framed texts, and the position where the last of them begins."""
        arrays, starts = frame.around(*texts)
        of_word = np.full(len(arrays["input_ids"]), NO_WORD, np.int32)
        if word_of_token is not None:
            of_word[starts[-1] : starts[-1] + len(word_of_token)] = word_of_token
        return EncodedSide(**arrays, word_of_token=of_word, words=words), starts[-1]

    def _encode(self, text: str) -> tuple[Ids, Ids]:
        """Token ids (n,) and their character offsets (n, 2), without special tokens; n is at least 1."""
        encoding: Encoding = self._backend.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return np.array([self._unknown]), np.zeros((1, 2), np.int32)
        return self._text_ids(encoding), np.array(encoding.offsets, np.int32)

    def _encode_words(self, words: tuple[str, ...]) -> tuple[Ids, Ids]:
        """Token ids (n,) and the word of each (n,), each word with at least one token."""
        encoding: Encoding = self._backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        ids, word_of_token = self._text_ids(encoding), np.array(encoding.word_ids, np.int32)
        lost = np.setdiff1d(np.arange(len(words), dtype=np.int32), word_of_token)
        places = np.searchsorted(word_of_token, lost)
        return np.insert(ids, places, self._unknown), np.insert(word_of_token, places, lost)

    def _text_ids(self, encoding: Encoding) -> Ids:
        """The ids of an encoding, a special token in it as unknown: unigram models read spelled ones as pieces."""
        ids = np.array(encoding.ids, np.int32)
        return np.where(np.isin(ids, self._never_text), self._unknown, ids)

    def _frame(self, first: str, second: str | None) -> _Frame:
        """The frame that the tokenizer puts around one text or two, read off an example."""
        encoding: Encoding = self._backend.encode(first, second)
        runs = [(kind, list(run)) for kind, run in groupby(range(len(encoding.ids)), encoding.sequence_ids.__getitem__)]
        order = [kind for kind, _ in runs]
        wanted = [None, 0, None] if second is None else [None, 0, None, 1, None]
        if order != wanted or encoding.ids[0] != self.tokenizer.cls_token_id:
            raise DataError(
                f"tokenizer {self.tokenizer.name_or_path!r} does not put {self.tokenizer.cls_token} before a text and"
                f" {self.tokenizer.sep_token} behind it, as an encoder's does"
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
            raise DataError(f"{name} is not a fast tokenizer, so it does not say which word a token belongs to")
        needed = ["cls_token", "sep_token", "pad_token", "unk_token"]
        for token in [*needed, "mask_token"] if self.config.kind == "text" else needed:
            if getattr(self.tokenizer, token) is None:
                raise DataError(f"{name} has no {token}; take an encoder's, or train one with style: encoder")

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
