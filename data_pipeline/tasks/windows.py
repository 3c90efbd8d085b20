"""Splits long texts into windows: ranges of tokens or words, computed from token counts and character offsets."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Range = tuple[int, int]


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens kept of one or two texts, at most `room` in total: the longer is truncated first, then both equally."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    short = min(*lengths, max(room // 2, room - max(lengths)))
    long = min(max(lengths), room - short)
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def strided(n_tokens: int, room: int, stride: int) -> list[Range]:
    """Ranges of `room` tokens, one every `stride` tokens, until the end of the text."""
    ranges = [(0, min(room, n_tokens))]
    while ranges[-1][1] < n_tokens:
        start = ranges[-1][0] + min(stride, room)
        ranges.append((start, min(start + room, n_tokens)))
    return ranges


def word_ranges(first_token: npt.NDArray[np.int64], room: int, stride: int) -> list[Range]:
    """Ranges of whole words of at most `room` tokens, one about every `stride` tokens; no word is skipped.

    Args:
        first_token: (words + 1,) the first token of each word, and the number of tokens.
    """
    n_words = len(first_token) - 1
    ranges: list[Range] = []
    start = stop = 0
    while stop < n_words:
        stop = max(int(np.searchsorted(first_token, first_token[start] + room, "right")) - 1, start + 1)
        ranges.append((start, stop))
        following = int(np.searchsorted(first_token, first_token[start] + stride))
        start = min(max(following, start + 1), stop)
    return ranges


def without_space(offsets: Ids, text: str) -> Ids:
    """Offsets (n, 2) of tokens without the white space that some tokenizers include."""
    trimmed = []
    for start, stop in offsets.tolist():
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and text[stop - 1].isspace():
            stop -= 1
        trimmed.append((start, stop))
    return np.array(trimmed, np.int32)


def with_marks(offsets: Ids, text: str) -> Ids:
    """Offsets (n, 2) of tokens, extended over the following combining marks that no token covers.

    Tokenizers that compose or strip accents exclude the mark of a decomposed accent ("e" and U+0301) from offsets.
    """
    marks = [place for place, char in enumerate(text) if unicodedata.category(char)[0] == "M"]
    if not marks:
        return offsets
    bare = np.zeros(len(text) + 1, np.bool_)
    bare[marks] = True
    for start, stop in offsets.tolist():
        bare[start:stop] = False
    found = offsets.copy()
    for number, (start, stop) in enumerate(offsets.tolist()):
        while start < stop and bare[stop]:
            stop += 1
        found[number, 1] = stop
    return found


def answer_tokens(offsets: Ids, answer: tuple[str, int]) -> Range | None:
    """First and last token of an answer (text, start).

    Args:
        offsets: (n, 2) character offsets of the tokens.

    Returns:
        None if no token covers the answer.
    """
    text, start = answer
    begins, stops = offsets[:, 0], offsets[:, 1]
    tokens = np.flatnonzero((begins < start + len(text)) & (stops > start) & (begins < stops))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None
