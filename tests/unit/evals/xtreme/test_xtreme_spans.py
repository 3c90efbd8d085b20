"""Span decoding equals a loop over every pair of positions of every window."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.tasks.tokenize import EncodedSide
from evals.xtreme.spans import ScoredWindow, best_span, window_of_each

CONTEXT = "Die alte Brücke in Budapest wurde 1949 nach dem Krieg wieder auf ge baut und ist heute sehr schön ."
WORDS = CONTEXT.split(" ")
QUESTION = 4  # tokens before the context: <s> question </s> </s>


def offsets() -> list[tuple[int, int]]:
    found, place = [], 0
    for word in WORDS:
        found.append((place, place + len(word)))
        place += len(word) + 1
    return found


def window(first: int, stop: int) -> EncodedSide:
    """Tokens first..stop-1 of the context behind a question, and a last special token."""
    n = QUESTION + stop - first + 1
    characters = np.full((n, 2), -1, np.int32)
    characters[QUESTION : n - 1] = offsets()[first:stop]
    ids = np.zeros(n, np.int32)
    return EncodedSide(ids, ids.astype(np.int8), ids - 1, ids > 0, words=(first, stop), context_offsets=characters)


def scored(ranges: list[tuple[int, int]], rng: np.random.Generator) -> list[ScoredWindow]:
    windows = [window(*each) for each in ranges]
    return [
        ScoredWindow(each, rng.normal(size=len(each)).astype(np.float32), rng.normal(size=len(each)).astype(np.float32))
        for each in windows
    ]


def slow_context(token: int, first: int, stop: int) -> float:
    return min(token - first, stop - 1 - token) + 0.01 * (stop - first)


def slow_best(windows: list[ScoredWindow], n_best: int, max_tokens: int) -> tuple[str, float]:
    """Every window, every start, every end; the rules of the docstring, one by one."""
    best = ("", -np.inf)
    for number, each in enumerate(windows):
        first, stop = each.window.words
        tokens = list(range(first, stop))
        starts = sorted(tokens, key=lambda t: -each.start[QUESTION + t - first])[:n_best]
        ends = sorted(tokens, key=lambda t: -each.end[QUESTION + t - first])[:n_best]
        for one in sorted(starts):
            contexts = [
                slow_context(one, *other.window.words) if other.window.words[0] <= one < other.window.words[1] else -1
                for other in windows
            ]
            if contexts.index(max(contexts)) != number:
                continue
            for other in sorted(ends):
                if one <= other < one + max_tokens:
                    score = float(each.start[QUESTION + one - first] + each.end[QUESTION + other - first])
                    if score > best[1]:
                        best = (CONTEXT[offsets()[one][0] : offsets()[other][1]], score)
    return best


@pytest.mark.parametrize("n_best", [3, 6, 20])
@pytest.mark.parametrize("max_tokens", [1, 3, 30])
@pytest.mark.parametrize("ranges", [[(0, 20)], [(0, 9), (4, 13), (8, 17), (12, 20)], [(0, 10), (10, 20)]])
def test_the_best_span_equals_that_of_an_exhaustive_search(
    ranges: list[tuple[int, int]], n_best: int, max_tokens: int
) -> None:
    rng = np.random.default_rng(n_best * 100 + max_tokens)
    compared = 0
    for _ in range(40):
        windows = scored(ranges, rng)
        text, score = slow_best(windows, n_best, max_tokens)
        if text:  # else no pair of the candidates is a span, which another test covers
            found = best_span(CONTEXT, windows, n_best, max_tokens)
            assert (found.text, found.score) == (text, pytest.approx(score, rel=1e-6))
            assert CONTEXT[found.first : found.first + len(found.text)] == found.text
            compared += 1
    assert compared >= 10


def test_only_tokens_of_the_context_form_an_answer() -> None:
    one = window(0, 20)
    start, end = np.zeros(len(one), np.float32), np.zeros(len(one), np.float32)
    start[[0, 1, 2, 3, len(one) - 1]] = 50.0  # <s>, the question and </s> have the highest scores
    end[[0, 1, 2, 3, len(one) - 1]] = 50.0
    start[QUESTION + 4], end[QUESTION + 6] = 1.0, 1.0
    assert best_span(CONTEXT, [ScoredWindow(one, start, end)]).text == "Budapest wurde 1949"


def test_any_pair_is_allowed_if_the_candidates_form_no_span() -> None:
    one = window(0, 20)
    start, end = np.zeros(len(one), np.float32), np.zeros(len(one), np.float32)
    start[QUESTION + 15 : QUESTION + 18] = 9.0
    end[QUESTION : QUESTION + 3] = 9.0
    found = best_span(CONTEXT, [ScoredWindow(one, start, end)], n_best=3)
    assert found.text
    assert found.score == 9.0


def test_ties_take_the_first_window_and_answers_exclude_outer_white_space() -> None:
    context = "ab  cd"
    arrays = np.zeros(3, np.int32)
    characters = np.array([(-1, -1), (0, 3), (3, 6)], np.int32)  # a tokenizer that includes spaces in words
    one = EncodedSide(
        arrays, arrays.astype(np.int8), arrays - 1, arrays > 0, words=(0, 2), context_offsets=characters
    )  # fmt: skip
    zeros = np.zeros(3, np.float32)
    found = best_span(context, [ScoredWindow(one, zeros, zeros)])
    assert (found.text, found.first) == ("ab", 0)
    end = np.array([0, -9, 0], np.float32)
    start = np.array([0, -9, 0], np.float32)
    assert best_span(context, [ScoredWindow(one, start, end)]).text == "cd"
    assert best_span(context, [ScoredWindow(one, start, end)]).first == 4


def test_tokens_without_characters_form_no_answer() -> None:
    arrays = np.zeros(3, np.int32)
    characters = np.array([(-1, -1), (0, 0), (0, 5)], np.int32)
    one = EncodedSide(
        arrays, arrays.astype(np.int8), arrays - 1, arrays > 0, words=(0, 2), context_offsets=characters
    )  # fmt: skip
    start, end = np.array([0, 9, 0], np.float32), np.array([0, 9, 0], np.float32)
    assert best_span("Wort.", [ScoredWindow(one, start, end)]).text == "Wort."


def test_each_token_belongs_to_the_window_with_most_context() -> None:
    ranges = [(0, 9), (4, 13), (8, 17), (12, 20), (19, 20)]
    expected = []
    for token in range(20):
        contexts = [slow_context(token, *each) if each[0] <= token < each[1] else -1 for each in ranges]
        expected.append(contexts.index(max(contexts)))
    assert window_of_each(ranges).tolist() == expected
    assert set(expected) == {0, 1, 2, 3}
