"""The words that everything else uses: Record, TokenizedSample, MicroBatch.

In: nothing. Out: plain frozen data. Next: `sources.py`, which turns rows of files into Records.

Languages are strings ("en", "sw") in files, configs and Records, and small integers (an index into the
run's declared `languages`) in every array. -1 means "no language": such a token is never shifted, pooled
or counted.

Shapes: T tokens of one sample, B rows of a micro-batch, N label positions, P pairs.
"""

from __future__ import annotations

import hashlib
import unicodedata
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
class Record:
    """One labelled sample in one language, as read from a source.

    `group` is the item: Records with the same group in different languages are translations of each other. It is in
    Unicode's form NFC (`item_key`). The last message is the assistant's answer, written in `response_language`.
    """

    id: str
    group: str
    language: str
    response_language: str
    messages: tuple[Message, ...]
    origin: str  # "file.jsonl:17", for messages to people

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is written in it."""
        return tuple(message.content for message in self.messages)

    @property
    def user_text(self) -> str:
        """All user turns, joined: what a translation pair has in common."""
        return "\n".join(message.content for message in self.messages if message.role == "user")

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all messages."""
        return sum(len(text.encode()) for text in self.texts)


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One sample as tokens. All arrays are (T,).

    `labels` marks the tokens to be predicted: every answer token and its end token, but for turns of weight 0.
    `content` marks the tokens of the user's own words: no template, no special token, never the first token.
    `answer` marks the assistant's own words, predicted or not: no end token, no template. Prompt tokens are written
    in `language`, tokens of `labels` and `answer` in `response_language`.
    A label-free sample (pairing `fill`) has no label at all.
    """

    id: str
    group: int  # stable_hash of Record.group
    content_hash: int  # stable_hash of Record.user_text
    language: int
    response_language: int
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]
    content: npt.NDArray[np.bool_]
    answer: npt.NDArray[np.bool_]
    truncated: bool = False  # its prompt lost words, to fit data.sequence_length

    def __len__(self) -> int:
        return len(self.input_ids)


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
