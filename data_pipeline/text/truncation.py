"""Truncates long conversations: prompts are shortened from the left, trained answers are kept whole.

Messages are shortened rather than token arrays, so that the template's headers and special tokens stay complete and
the masks are built as for any other sample.
"""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from data_pipeline.records import ChatSample, Record
from data_pipeline.tasks.windows import longest_first
from data_pipeline.text.chat import Chat

ZERO_WIDTH_JOINER = "\u200d"


def truncate(
    chat: Chat, record: Record, sample: ChatSample, most: int, *, labelled: bool = True
) -> tuple[Record, ChatSample] | None:
    """Shortens a record to at most `most` tokens.

    Earlier turns are shortened first, the oldest before the others: user turns, and answers of weight 0. Then the
    longer of the system message and the last user turn is shortened, until both are equally long. Each message keeps
    at least its last token, so that every sample has a question.

    Args:
        sample: the tokens of `record`.

    Returns:
        The shortened record and its sample; None if the prompt cannot be shortened enough.
    """
    while (excess := len(sample) - most) > 0:
        shorter = _shortened(chat, record, excess)
        if shorter is None:
            return None
        record = shorter
        sample = chat.tokenize(record, labelled=labelled)
    return record, replace(sample, truncated=True)


def _shortened(chat: Chat, record: Record, excess: int) -> Record | None:
    """The record with about `excess` fewer tokens in the first messages that can be shortened; None if none can.

    The number is approximate: inside the template a message may have other tokens at its edges than by itself.
    """
    messages = list(record.conversation.messages)
    read = [number for number, message in enumerate(messages) if message.role == "user" or not message.trained]
    systems = [number for number, message in enumerate(messages) if message.role == "system"]
    last = max(number for number in read if messages[number].role == "user")
    for candidates in [[number] for number in read if number < last] + [[*systems, last]]:
        starts = [chat.token_starts(messages[number].content) for number in candidates]
        lengths = [len(each) for each in starts]
        kept = longest_first(lengths, max(sum(lengths) - excess, len(lengths)))
        changed = False
        for number, starts_of_message, keep in zip(candidates, starts, kept, strict=True):
            shorter = _end_of(messages[number].content, starts_of_message, keep)
            changed |= shorter != messages[number].content
            messages[number] = replace(messages[number], content=shorter)
        if changed:
            return replace(record, content=replace(record.conversation, messages=tuple(messages)))
    return None


def _end_of(text: str, starts: list[int], keep: int) -> str:
    """The end of a text in at most `keep` tokens, starting at the start of a token and of a written character.

    Args:
        starts: start of each token.

    Returns:
        The whole text if `keep` covers it, or if there is no such start.
    """
    if keep >= len(starts):
        return text
    for start in starts[len(starts) - keep :]:
        while start < len(text) and _continues(text, start):
            start += 1
        if start and text[start:].strip():
            return text[start:].lstrip()
    return text


def _continues(text: str, place: int) -> bool:
    """Whether the character at `place` belongs to the one before it: a vowel sign, an accent, a joined emoji."""
    return place > 0 and (
        unicodedata.category(text[place]).startswith("M") or ZERO_WIDTH_JOINER in text[place - 1 : place + 1]
    )
