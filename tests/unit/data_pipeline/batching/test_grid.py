"""batching/grid.py: rows hold each sample once, no longer than allowed, in a rectangle at most that of best fit.

Properties over random micro-batches; best fit and largest first are compared with quadratic implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.batching.grid import Grid, best_fit, largest_first

SEEDS = range(200)
ROW, BUDGET = 96, 480


def lengths_of(seed: int, longest: int = ROW) -> list[int]:
    """Up to 60 lengths: uniform, or mostly short, or few values, so that many rows are equally long."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 61))
    kinds = [
        random.integers(1, longest + 1, n),
        np.clip(random.exponential(longest / 6, n), 1, longest).astype(int),
        random.choice([longest // 4, longest // 2, longest], n),
    ]
    return kinds[seed % 3].tolist()


def naive_best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int]]:
    """Each item goes to the fullest bin with room, the first of several; each time all bins are compared."""
    bins: list[int] = []
    totals: list[int] = []
    for length in lengths:
        fitting = [number for number, total in enumerate(totals) if total + length <= capacity]
        if not fitting:
            totals.append(0)
            fitting = [len(totals) - 1]
        fullest = max(fitting, key=lambda number: (totals[number], -number))
        totals[fullest] += length
        bins.append(fullest)
    return bins, totals


def naive_largest_first(costs: Sequence[float], loads: Sequence[float]) -> tuple[list[int], list[float]]:
    """Each item goes to the bin with the lowest load, then the fewest items; each time all bins are compared."""
    totals, items, bins = list(loads), [0] * len(loads), []
    for cost in costs:
        lowest = min(range(len(totals)), key=lambda number: (totals[number], items[number], number))
        totals[lowest] += cost
        items[lowest] += 1
        bins.append(lowest)
    return bins, totals


def rectangle(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return len(rows) * max(sum(lengths[number] for number in row) for row in rows)


def test_rows_hold_every_sample_once_and_are_no_longer_than_allowed() -> None:
    """A row above `row_tokens` is that of a single sample. Samples and rows keep the given order."""
    for seed in SEEDS:
        lengths = lengths_of(seed, longest=ROW if seed % 4 else 2 * ROW)
        rows = Grid("packed", BUDGET, ROW).rows(lengths)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths))), seed
        for row in rows:
            assert row == sorted(row), seed
            assert sum(lengths[number] for number in row) <= ROW or len(row) == 1, seed
        assert rows == sorted(rows), seed


def test_the_rectangle_is_at_most_that_of_best_fit_and_its_size_is_known() -> None:
    for seed in SEEDS:
        lengths, grid = lengths_of(seed), Grid("packed", BUDGET, ROW)
        rows = grid.rows(lengths)
        _, totals = naive_best_fit(sorted(lengths, reverse=True), ROW)
        assert sum(lengths) <= rectangle(rows, lengths) <= len(totals) * max(totals), seed
        assert grid.tokens(lengths) == rectangle(rows, lengths), seed


def test_short_samples_leave_little_padding() -> None:
    """With 24 samples of at most half a row: on average 4 % of the rectangle, half of best fit's share at most."""
    padding, of_best_fit, grid = [], [], Grid("packed", 10 * BUDGET, ROW)
    for seed in SEEDS:
        lengths = np.random.default_rng(seed).integers(1, ROW // 2 + 1, 24).tolist()
        _, totals = naive_best_fit(sorted(lengths, reverse=True), ROW)
        padding.append(1 - sum(lengths) / grid.tokens(lengths))
        of_best_fit.append(1 - sum(lengths) / (len(totals) * max(totals)))
    assert np.mean(padding) < min(0.04, np.mean(of_best_fit) / 2)


def test_a_few_rectangles_by_hand() -> None:
    grid = Grid("packed", 100, 20)
    assert grid.rows([5, 5, 5, 5]) == [[0, 1, 2, 3]]
    assert (grid.tokens([5, 5, 5, 5]), grid.tokens([]), grid.rows([])) == (20, 0, [])
    assert (grid.rows([16, 10, 4, 10]), grid.tokens([16, 10, 4, 10])) == ([[0, 2], [1, 3]], 40)
    assert grid.rows([6, 6, 6, 6]) == [[0, 2], [1, 3]], "best fit: 18 and 6, 36 tokens"
    assert grid.tokens([6, 6, 6, 6]) == 24
    assert grid.rows([11, 11, 11]) == [[0], [1], [2]]
    assert grid.tokens([11, 11, 11]) == 33
    assert (grid.rows([30, 4]), grid.tokens([30, 4])) == ([[0], [1]], 60), "a single sample may be longer than a row"


def test_without_a_row_length_all_samples_are_in_one_row() -> None:
    """For varlen attention: as long as the micro-batch allows."""
    for seed in SEEDS:
        lengths = lengths_of(seed)
        grid = Grid("packed", max(sum(lengths), 2 * ROW), None)
        assert (grid.rows(lengths), grid.tokens(lengths)) == ([list(range(len(lengths)))], sum(lengths)), seed
        assert replace(grid, micro_batch_tokens=ROW).longest_row == ROW


@pytest.mark.parametrize("sides", [1, 2])
def test_padded_rows_hold_one_sample_each(sides: int) -> None:
    grid = Grid("padded", BUDGET, ROW, sides)
    for seed in SEEDS:
        lengths = lengths_of(seed)
        assert grid.rows(lengths) == [[number] for number in range(len(lengths))]
        assert grid.tokens(lengths) == sides * len(lengths) * max(lengths)
    assert (grid.tokens([]), grid.rows([])) == (0, [])


@pytest.mark.parametrize(("sides", "label_cost"), [(1, 0.0), (1, 0.25), (2, 0.0), (2, 1.5)])
def test_a_sample_costs_its_rows_and_its_labels(sides: int, label_cost: float) -> None:
    random = np.random.default_rng(0)
    lengths, labels = random.integers(1, 99, 40), random.integers(0, 9, 40)
    costs = Grid("padded", BUDGET, ROW, sides, label_cost).costs(lengths, labels)
    assert costs.tolist() == [
        sides * length + label_cost * n for length, n in zip(lengths.tolist(), labels.tolist(), strict=True)
    ]


def test_best_fit_equals_a_search_of_all_bins() -> None:
    for seed in SEEDS:
        lengths = sorted(lengths_of(seed, longest=ROW if seed % 4 else 2 * ROW), reverse=True)
        assert best_fit(lengths, ROW) == naive_best_fit(lengths, ROW), seed


def test_best_fit_needs_at_most_11_ninths_of_the_optimal_number_of_bins() -> None:
    """Johnson's bound for best fit decreasing, on full bins that are cut at random places."""
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        n_bins = int(random.integers(1, 12))
        cuts = [np.sort(random.choice(np.arange(1, ROW), 3, replace=False)) for _ in range(n_bins)]
        items = np.concatenate([np.diff(cut, prepend=0, append=ROW) for cut in cuts])
        _, totals = best_fit(sorted(items.tolist(), reverse=True), ROW)
        assert n_bins <= len(totals) <= 11 / 9 * n_bins + 6 / 9


def test_largest_first_equals_a_search_of_all_bins() -> None:
    """Integer and other costs, in any order, from no load and from given loads."""
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        n_bins, n = int(random.integers(1, 9)), int(random.integers(0, 50))
        costs = (random.integers(1, 9, n) if seed % 2 else random.random(n)).tolist()
        loads = random.integers(0, 12, n_bins).astype(float).tolist()
        bins, totals = naive_largest_first(costs, [0.0] * n_bins)
        assert largest_first(costs, n_bins) == (bins, max(totals)), seed
        bins, totals = naive_largest_first(costs, loads)
        assert largest_first(costs, n_bins, loads) == (bins, max(totals)), seed


def test_the_largest_load_is_at_most_4_thirds_of_the_optimum() -> None:
    """Graham's bound for descending costs: the optimum is the full load of bins that are cut at random places."""
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        n_bins = int(random.integers(1, 9))
        costs = np.concatenate([np.diff(np.sort(random.random(3)), prepend=0, append=1) for _ in range(n_bins)])
        _, largest = largest_first(np.sort(costs)[::-1].tolist(), n_bins)
        assert 1 - 1e-9 <= largest <= 4 / 3 + 1e-9


def micro_batches() -> Iterator[tuple[Grid, list[int]]]:
    for seed in range(600):
        random = np.random.default_rng(seed)
        lengths = np.clip(random.exponential(float(random.uniform(4, 40)), random.integers(1, 60)), 1, ROW)
        if seed % 4 == 0:  # no two of these share a row
            lengths = random.integers(ROW // 2 + 1, ROW // 2 + 9, random.integers(1, 9))
        grid = Grid("packed", BUDGET + int(random.integers(0, ROW)), ROW if seed % 5 else None)
        yield grid, lengths.astype(int).tolist()


def test_micro_batches_that_surely_fit_are_within_the_budget() -> None:
    """The claim is made without packing; it is never wrong, and it is made for most micro-batches that fit."""
    claimed = several_rows = fitting = 0
    for grid, lengths in micro_batches():
        (sure,) = grid.surely_fit(np.array([sum(lengths)]), np.array([max(lengths)]))
        fits = rectangle(grid.rows(lengths), lengths) <= grid.micro_batch_tokens
        assert (fits and grid.needed(lengths) <= grid.micro_batch_tokens) or not sure, lengths
        fitting += fits
        claimed += bool(sure)
        several_rows += bool(sure) and sum(lengths) > grid.longest_row
    assert claimed > fitting / 2
    assert several_rows > 50


def test_the_budget_that_is_needed_holds_the_samples() -> None:
    """For grids whose own budget is too small, too; with whole rows it is at most that of best fit."""
    for seed in SEEDS:
        lengths = lengths_of(seed)
        for row in (ROW, None):
            grid = Grid("packed", 3 * ROW, row)
            needed = grid.needed(lengths)
            _, totals = naive_best_fit(sorted(lengths, reverse=True), ROW)
            tokens = replace(grid, micro_batch_tokens=needed).tokens(lengths)
            assert sum(lengths) <= tokens <= needed <= len(totals) * ROW, (seed, row)
            assert row or needed == sum(lengths)
        for sides in (1, 2):
            padded = Grid("padded", ROW, ROW, sides)
            assert padded.needed(lengths) == padded.tokens(lengths), seed


def test_padded_micro_batches_never_surely_fit() -> None:
    assert Grid("padded", BUDGET, ROW).surely_fit(np.array([1, 50]), np.array([1, 9])).tolist() == [False, False]
