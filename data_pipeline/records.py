"""Record and Sample: one labelled text as read from a source, and as tokens.

A Record is the same for every kind of rows; its content is a Conversation (decoders) or an Example (the tasks of
encoders). A text stage (`reader.py`) turns Records into Samples, `batching/` turns Samples into Batches.

Languages are strings ("en", "sw") in files, configs and Records, and small integers (an index into the
run's declared `languages`) in every array, Slot and Sample. -1 means "no language": such a token is never shifted,
pooled or counted.

Shapes: T tokens of one sample.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant"]
NO_LANGUAGE = -1


class DataError(Exception):
    """Data that the user can mend: one line naming file, line or key, what is wrong and what would be right."""

    exit_status = 2


class BadRow(DataError):
    """One row that cannot be used. Its slot stays empty; the run stops once more than `max_bad_rows` did."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin = origin
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.origin, self.reason)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `trained`: an assistant's turn is predicted, not only read (`weight` in files)."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a decoder learns from. The last message is the assistant's answer, written in `response_language`."""

    messages: tuple[Message, ...]
    response_language: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All messages."""
        return tuple(message.content for message in self.messages)

    @property
    def user_text(self) -> str:
        """All user turns, joined: what translations have in common."""
        return "\n".join(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True, slots=True)
class Example:
    """One text with its labels, for a task of encoders: a row's own, or its back-translation.

    texts       classification: (text,) or (text_a, text_b); qa: (question, context); tagging: the words; text: (text,)
    label       classification
    tags        tagging: a tag a word
    soft_tags   tagging: for each word the probability of each of `task.labels`
    answers     qa: (text, where it starts in the context, in characters); training takes the first
    """

    texts: tuple[str, ...]
    label: str | None = None
    tags: tuple[str, ...] | None = None
    soft_tags: tuple[tuple[float, ...], ...] | None = None
    answers: tuple[tuple[str, int], ...] | None = None

    @property
    def user_text(self) -> str:
        """All texts, joined: what translations have in common."""
        return "\n".join(self.texts)


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled text in one language, as read from a source.

    `group` is the item: Records with the same group in different languages are translations of each other. It is in
    Unicode's form NFC (`item_key`). `back` is an Example translated into the dominant language, where the row has it.
    """

    id: str
    group: str
    language: str
    origin: str  # "file.jsonl:17", for messages to people
    content: Conversation | Example
    back: Example | None = None

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
        """Everything that is written in it, in its own language."""
        return self.content.texts

    @property
    def user_text(self) -> str:
        """What its translations have in common."""
        return self.content.user_text

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        return sum(len(text.encode()) for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(ABC):
    """One sample as tokens. Each text stage has its own subclass, which only that stage and its collator look into."""

    id: str
    group: int  # stable_hash of Record.group
    language: int
    truncated: bool = False  # its texts were cut to data.sequence_length

    @abstractmethod
    def __len__(self) -> int:
        """Tokens of its own text."""

    @property
    @abstractmethod
    def n_labels(self) -> int:
        """Positions whose states meet the LM head."""

    @property
    def row_length(self) -> int:
        """Tokens of the longest row that it takes in a padded batch."""
        return len(self)

    def tokens_by_language(self) -> Iterator[tuple[int, int]]:
        """(language, tokens) of all that it makes the model read."""
        yield self.language, len(self)

    def fingerprint(self) -> int:
        """A 63-bit hash of which sample it is."""
        return stable_hash(self.language, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSample(Sample):
    """A conversation as tokens. All arrays are (T,).

    `labels` marks the tokens to be predicted: every answer token and its end token, but for turns of weight 0.
    `content` marks the tokens of the user's own words: no template, no special token, never the first token.
    `answer` marks the assistant's own words, predicted or not: no end token, no template. Prompt tokens are written
    in `language`, tokens of `labels` and `answer` in `response_language`.
    A label-free sample (pairing `fill`) has no label at all.
    """

    content_hash: int  # stable_hash of Record.user_text
    response_language: int
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]
    content: npt.NDArray[np.bool_]
    answer: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_labels(self) -> int:
        return int(self.labels.sum())


def normalized(text: str) -> str:
    """A text for comparison: NFKC, case folded, each run of white space one space, none at the ends."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def item_key(name: str) -> str:
    """A group or id as it is compared: in Unicode's form NFC, so that one spelled in NFD is the same item."""
    return unicodedata.normalize("NFC", name)


def stable_hash(*parts: object) -> int:
    """A 63-bit hash that is the same on every machine, process and Python version."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
