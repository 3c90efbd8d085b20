"""Record and Sample: a labelled text as read from a source, and its tokens.

Every kind of row is read as a Record, whose content is a Conversation (decoders) or an Example (tasks of encoders).
A text stage (`reader.py`) turns Records into Samples, and `batching/` turns Samples into Batches.

Languages are strings ("en", "sw") in files, configs and Records, and integers (indices into the run's declared
`languages`) in arrays, Slots and Samples. -1 means "no language": such a token is never shifted, pooled or counted.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant"]
NO_LANGUAGE = -1


class Split(IntEnum):
    """What a row is used for."""

    TRAIN = 0
    HELD_OUT = 1
    PARALLEL = 2  # a text of the parallel corpus, `data.pairs`


class DataError(Exception):
    """A mistake in the data that the user can correct. The message names the place, the mistake and the remedy."""

    exit_status = 2


class BadRow(DataError):
    """A row that cannot be used. Its slot stays empty; the run stops if there are more than `max_bad_rows`."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.origin, self.reason)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    trained: bool = True  # an assistant turn contributes to the loss (`weight` in files)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The content of a row for decoders. The last message is the assistant's answer, in `response_language`.

    A text of the parallel corpus is a user's message without an answer.
    """

    messages: tuple[Message, ...]
    response_language: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All messages."""
        return tuple(message.content for message in self.messages)

    @property
    def user_text(self) -> str:
        """All user turns, joined: the text that is compared between translations."""
        return "\n".join(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled text for a task of encoders: a row's own text, or its back-translation."""

    # classification: (text,) or (text_a, text_b); qa: (question, context); tagging: the words; text: (text,)
    texts: tuple[str, ...]
    label: str | None = None
    tags: tuple[str, ...] | None = None  # tagging: one tag per word
    # tagging: for each word the probability of each of `task.labels`
    soft_tags: tuple[tuple[float, ...], ...] | None = None
    # qa: (text, start in the context in characters); training uses the first answer
    answers: tuple[tuple[str, int], ...] | None = None

    @property
    def user_text(self) -> str:
        """All texts, joined: the text that is compared between translations."""
        return "\n".join(self.texts)


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled text in one language, as read from a source."""

    id: str
    # the item, in Unicode form NFC (`item_key`). Records with the same group in different languages are translations
    # of each other.
    group: str
    language: str  # code of the text's language
    origin: str  # the row's place for messages, such as "file.jsonl:17"
    content: Conversation | Example  # texts and labels
    back: Example | None = None  # the Example translated into the dominant language, if the row has one
    parallel: bool = False  # a text of the parallel corpus, which has no answer

    @property
    def conversation(self) -> Conversation:
        """The content of a row of a source of conversations. Raises DataError for a task's row."""
        if not isinstance(self.content, Conversation):
            raise DataError(f"{self.origin}: a row of a task, where a conversation is needed (prompt, completion)")
        return self.content

    @property
    def example(self) -> Example:
        """The content of a task's row. Raises DataError for a conversation."""
        if not isinstance(self.content, Example):
            raise DataError(f"{self.origin}: a conversation, where a row of a task is needed")
        return self.content

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the row, without the back-translation."""
        return self.content.texts

    @property
    def user_text(self) -> str:
        """The text that is compared between translations."""
        return self.content.user_text

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(len(text.encode()) for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(ABC):
    """A tokenised sample. Each text stage has its own subclass, which is used by that stage and its collator only."""

    id: str
    group: int  # stable_hash of Record.group
    language: int
    truncated: bool = False  # texts were truncated to data.sequence_length

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens of the sample's own text."""

    @property
    @abstractmethod
    def n_labels(self) -> int:
        """Number of positions for which the LM head computes logits."""

    @property
    def row_length(self) -> int:
        """Number of tokens of its longest row in a padded batch."""
        return len(self)

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """The sample's contribution to the counts of its step, which loss terms are divided by."""

    def tokens_by_language(self) -> Iterator[tuple[int, int]]:
        """(language, number of tokens) of each text that the model reads: one, or two with a partner."""
        yield self.language, len(self)

    def fingerprint(self) -> int:
        """A 63-bit hash that identifies the sample."""
        return stable_hash(self.language, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSample(Sample):
    """A tokenised conversation. All arrays are (T,).

    Prompt tokens are in `language`, tokens of `labels` and `answer` in `response_language`. An unlabelled sample
    (pairing `fill`, or a text of the parallel corpus) has no labels.
    """

    content_hash: int  # stable_hash of Record.user_text
    response_language: int  # index of the answer's language
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]  # tokens to be predicted: answers and their end tokens, except in turns of weight 0
    content: npt.NDArray[np.bool_]  # tokens of user text: no template, no special token, never the first token
    answer: npt.NDArray[np.bool_]  # tokens of assistant text, predicted or not: no end token, no template
    parallel: bool = False  # a text of the parallel corpus

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_labels(self) -> int:
        return int(self.labels.sum())

    def counts(self) -> dict[str, int]:
        return {"label_tokens": int(self.labels[1:].sum())}  # no position predicts the first token


def normalized(text: str) -> str:
    """A text normalised for comparison: NFKC, case-folded, runs of white space replaced by one space, stripped."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def item_key(name: str) -> str:
    """A group or id in Unicode form NFC, in which they are compared, so that NFC and NFD spellings are equal."""
    return unicodedata.normalize("NFC", name)


def stable_hash(*parts: object) -> int:
    """A 63-bit hash that is the same on every machine, process and Python version."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
