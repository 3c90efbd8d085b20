"""A conversation that is too long, made to fit: its prompt loses words from the left, its answers lose none.

In: a Record and the longest sample. Out: a shorter Record and its tokens. Next: `text/stage.py`.

Messages are shortened, not token arrays: the sample is what the template makes of the shorter messages, headers and
special tokens whole, and its masks are made as those of any other sample.
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
    """`record`, whose tokens are `sample`, with at most `most` tokens; None where its prompt has not enough to lose.

    The words of earlier turns go first, the oldest before the others: the user's, and answers that are only read
    (weight 0). Then the longer of the system message and the last user turn gives way, until both are alike. Each keeps
    at least its last token: a sample without a question teaches nothing.
    """
    while (excess := len(sample) - most) > 0:
        shorter = _shortened(chat, record, excess)
        if shorter is None:
            return None
        record = shorter
        sample = chat.tokenize(record, labelled=labelled)
    return record, replace(sample, truncated=True)


def _shortened(chat: Chat, record: Record, excess: int) -> Record | None:
    """The record with about `excess` fewer tokens in the messages whose turn it is; None where none can be cut.

    About: a message in its template has other tokens at its edges than by itself.
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
    """The end of a text in `keep` tokens or fewer, from where a token and a written character begin.

    `starts`: where each token begins. The whole text where `keep` is all of it, or no later place is left.
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
    """Whether the character there belongs to the one before it: a vowel sign, an accent, a joined emoji."""
    return place > 0 and (
        unicodedata.category(text[place]).startswith("M") or ZERO_WIDTH_JOINER in text[place - 1 : place + 1]
    )
