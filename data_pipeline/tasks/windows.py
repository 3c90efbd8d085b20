"""Splits long texts into windows: ranges of tokens or words, computed from token counts and character offsets."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Literal

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
    places = np.arange(len(text) + 1, dtype=np.int32)
    space = _characters(text, "space")
    # the first character from each place on, and the last one before it, that is no white space
    following = np.minimum.accumulate(np.where(space, np.int32(len(text)), places[:-1])[::-1])[::-1]
    before = np.maximum.accumulate(np.where(space, np.int32(0), places[1:]))
    following, before = np.append(following, places[-1:]), np.append(places[:1], before)
    starts, stops = offsets[:, 0], offsets[:, 1]
    trimmed = np.where(starts < stops, np.minimum(following[starts], stops), starts)
    return np.stack([trimmed, np.where(trimmed < stops, before[stops], stops)], axis=1)


def with_marks(offsets: Ids, text: str) -> Ids:
    """Offsets (n, 2) of tokens, extended over the following combining marks that no token covers.

    Tokenizers that compose or strip accents exclude the mark of a decomposed accent ("e" and U+0301) from offsets.
    """
    marks = _characters(text, "mark")
    if not marks.any():
        return offsets
    starts, stops = offsets[:, 0], offsets[:, 1]
    real = starts < stops
    covered = np.zeros(len(text) + 1, np.int64)
    np.add.at(covered, starts[real], 1)
    np.add.at(covered, stops[real], -1)
    bare = marks & (np.cumsum(covered[:-1]) == 0)
    places = np.arange(len(text) + 1, dtype=np.int32)
    following = np.minimum.accumulate(np.where(bare, np.int32(len(text)), places[:-1])[::-1])[::-1]
    following = np.append(following, places[-1:])
    return np.stack([starts, np.where(real, following[stops], stops)], axis=1)


def _characters(text: str, kind: Literal["space", "mark"]) -> npt.NDArray[np.bool_]:
    """(characters,) True for white space, or for combining marks."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return _table(kind)[codes]


@cache
def _table(kind: Literal["space", "mark"]) -> npt.NDArray[np.bool_]:
    """(code points,)"""
    characters = map(chr, range(sys.maxunicode + 1))
    if kind == "space":
        return np.fromiter((char.isspace() for char in characters), np.bool_)
    return np.fromiter((unicodedata.category(char)[0] == "M" for char in characters), np.bool_)


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
