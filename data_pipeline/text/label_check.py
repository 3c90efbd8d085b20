"""Checks label masks: the labelled tokens of a sample, decoded, are its record's answers.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import normalize

import numpy as np

from data_pipeline.records import BadRow, ChatSample, DataError, Record
from data_pipeline.text.chat import Chat, Mask, Span

_SHOWN = 60  # characters shown of a text in a message


def check_labels(chat: Chat, records: Sequence[Record], samples: Sequence[ChatSample]) -> list[BadRow | None]:
    """Decodes the labelled tokens of samples, all together, and compares them with their records' answers.

    Returns:
        For each sample the BadRow, if its mask is correct, but the tokenizer cannot represent an answer.

    Raises:
        DataError: a mask is wrong: empty, too narrow, too wide, or without the end token.
    """
    found: list[BadRow | None] = [None] * len(records)
    end = chat.template.end_id
    numbers, answers, labelled = [], [], []
    for number, (record, sample) in enumerate(zip(records, samples, strict=True)):
        for answer, ids in _labelled_answers(chat, record, sample):
            numbers.append(number)
            answers.append(answer)
            labelled.append(ids)
    written = chat.decode_all(labelled)
    unlike = [place for place, answer in enumerate(answers) if written[place] != answer]
    for place, kept in zip(unlike, chat.rewritten([answers[place] for place in unlike]), strict=True):
        number, text, answer = numbers[place], written[place], answers[place]
        if text != kept:
            fault = "too wide" if kept in text else "too narrow" if text in kept else "another text"
            raise _mask_error(records[number], f"it is {fault}: {_short(text)} instead of {_short(answer)}")
        if found[number] is None and _normal(text) != _normal(answer):
            found[number] = BadRow(records[number].origin, _unlike(text, answer))
    for record, sample in zip(records, samples, strict=True):
        if not np.array_equal(sample.answer & sample.labels, sample.labels & (sample.input_ids != end)):
            raise _mask_error(record, "the answer mask is not the labels without end tokens")
        if sample.content[0] or (sample.content & sample.labels).any():
            raise _mask_error(record, "a content token is the first token or is labelled")
    return found


def _labelled_answers(chat: Chat, record: Record, sample: ChatSample) -> list[tuple[str, list[int]]]:
    """Each answer to train on with its labelled tokens, without the end token. Raises DataError."""
    messages = record.conversation.messages
    answers = [chat.template.answer_slot.words(m.content) for m in messages if m.role == "assistant" and m.trained]
    runs, end = _runs(sample.labels), chat.template.end_id
    if not runs:
        raise _mask_error(record, "no token is labelled")
    if len(runs) != len(answers):
        raise _mask_error(record, f"{len(runs)} labelled runs of tokens for {len(answers)} answers")
    found = []
    for (start, stop), answer in zip(runs, answers, strict=True):
        *ids, last = sample.input_ids[start:stop].tolist()
        if last != end:
            raise _mask_error(record, f"the end token {chat.decode([end])!r} is not its last token")
        if end in ids:
            raise _mask_error(record, f"it continues after the end token {chat.decode([end])!r}")
        found.append((answer, ids))
    return found


def _runs(mask: Mask) -> list[Span]:
    """(start, stop) of every run of True in a mask (T,)."""
    padded = np.zeros(len(mask) + 2, np.bool_)
    padded[1:-1] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _mask_error(record: Record, what: str) -> DataError:
    return DataError(f"{record.origin}: label mask: {what}")


def _normal(text: str) -> str:
    """The text without differences of composed characters and runs of white space, which tokenizers normalise."""
    return normalize("NFKC", " ".join(text.split()))


def _unlike(written: str, answer: str) -> str:
    """Why an answer cannot be used: both texts (long ones around the first difference) and the lost character."""
    texts = [_normal(written), _normal(answer)]
    at = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    shown = [_short(each) for each in (written, answer)]
    if max(map(len, texts)) > _SHOWN:
        shown = [_around(each, at) for each in texts]
    lost = f": U+{ord(texts[1][at]):04X} is lost" if at < len(texts[1]) else ""
    return f"the tokenizer writes {shown[0]} for {shown[1]}{lost}; change or remove the row"


def _around(text: str, at: int) -> str:
    start, stop = max(at - _SHOWN // 2, 0), at + _SHOWN // 2
    return repr(f"{'...' * (start > 0)}{text[start:stop]}{'...' * (stop < len(text))}")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}")
