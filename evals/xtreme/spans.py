"""From start and end logits to an answer: the best span over all windows of a context.

The rules of SQuAD 1.1's baselines, which published numbers follow: a span starts at one of the window's `n_best` starts
and ends at one of its `n_best` ends, contains only context tokens, at most `max_tokens` of them, and starts in the
window that shows most context around its first token. Its score is the sum of the two logits, compared over windows
without normalisation. There is always an answer: "no answer" is not possible.

Shapes: T tokens of a window, C tokens of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.tasks.tokenize import EncodedSide

N_BEST, MAX_TOKENS = 20, 30

Floats = npt.NDArray[np.float32]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """A window of a question and its context, and the logits (T,) of an answer's first and last token."""

    window: EncodedSide
    start: Floats
    end: Floats


@dataclass(frozen=True, slots=True)
class Span:
    """An answer: `context[first:stop]` without white space around it, and the sum of its two logits."""

    text: str
    first: int
    score: float


def window_of_each(ranges: Sequence[Range]) -> npt.NDArray[np.int64]:
    """(C,): for every token (or word), the window, of those that contain it, in which it has most context.

    ranges: the windows' (first, stop). Context is the smaller of the distances to the window's two ends, plus a
    hundredth of the window's length; of equal windows, the first.
    """
    best = np.full(max(stop for _, stop in ranges), -1.0)
    chosen = np.zeros(len(best), np.int64)
    for number, (first, stop) in enumerate(ranges):
        place = np.arange(stop - first)
        context = np.minimum(place, place[::-1]) + 0.01 * len(place)
        better = context > best[first:stop]
        best[first:stop][better] = context[better]
        chosen[first:stop][better] = number
    return chosen


def best_span(
    context: str, windows: Sequence[ScoredWindow], n_best: int = N_BEST, max_tokens: int = MAX_TOKENS
) -> Span:
    """The answer with the highest score; of equal ones, the first.

    If no pair of `n_best` starts and ends forms a span, any pair of the right length is allowed. Only a context without
    a visible character gives an empty answer.
    """
    most_context = window_of_each([scored.window.words for scored in windows])
    for candidates in (n_best, None):
        found = [
            span
            for number, scored in enumerate(windows)
            if (span := _best_in(context, scored, most_context, number, candidates, max_tokens)) is not None
        ]
        if found:
            return max(found, key=lambda span: span.score)
    return Span("", 0, float("-inf"))


def _best_in(
    context: str,
    scored: ScoredWindow,
    most_context: npt.NDArray[np.int64],
    number: int,
    n_best: int | None,
    max_tokens: int,
) -> Span | None:
    """The best span that starts in this window, None if there is none."""
    offsets = scored.window.context_offsets
    assert offsets is not None  # a window of question answering
    places = np.flatnonzero(offsets[:, 0] >= 0)  # of the context's tokens, one after the other
    first, last = offsets[places, 0], offsets[places, 1]
    start, end = scored.start[places], scored.end[places]
    starts = _highest(start, n_best) & (most_context[slice(*scored.window.words)] == number)
    length = np.arange(len(places))[None, :] - np.arange(len(places))[:, None] + 1
    allowed = starts[:, None] & _highest(end, n_best)[None, :] & (length >= 1) & (length <= max_tokens)
    allowed &= last[None, :] > first[:, None]  # tokens without characters form no answer
    if not allowed.any():
        return None
    scores = np.where(allowed, start[:, None] + end[None, :], -np.inf)
    one, other = np.unravel_index(int(scores.argmax()), scores.shape)
    text = context[first[one] : last[other]]
    return Span(text.strip(), int(first[one]) + len(text) - len(text.lstrip()), float(scores[one, other]))


def _highest(logits: Floats, n: int | None) -> npt.NDArray[np.bool_]:
    """(T,): whether each is among the n highest; all if n is None."""
    if n is None or n >= len(logits):
        return np.ones(len(logits), np.bool_)
    chosen = np.zeros(len(logits), np.bool_)
    chosen[np.argsort(-logits, kind="stable")[:n]] = True
    return chosen
