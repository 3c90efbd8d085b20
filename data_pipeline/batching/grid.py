"""The rows of one micro-batch: which samples share a row, and how many tokens the rectangle takes.

- `packed`: rows of at most `row_tokens` with several samples each. Position ids restart at each sample and there is
  no attention mask: attention is block-diagonal by position ids (or varlen, with a single row).
- `padded`: one text per row, right-padded, with an attention mask; correct for every model.

Shapes: n samples of one micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["packed", "padded"]
WELL_FILLED = 0.98  # share of real tokens above which no other number of rows is tried
MOST_TRIES = 8  # numbers of rows
FEW_ITEMS = 8  # a bin, up to which loads are evened out further
BISECTIONS = 8  # of the largest load


@dataclass(frozen=True, slots=True)
class Grid:
    """How samples are placed in the (rows, row length) rectangle of a micro-batch."""

    layout: Layout
    micro_batch_tokens: int  # limit of rows x row length
    row_tokens: int | None  # longest row of the packed layout; None: one row (for varlen attention)
    sides: int = 1  # rows per sample in the padded layout: 2 with partners
    label_cost: float = 0.0  # cost of a label at the LM head, in tokens of the layers

    @property
    def longest_row(self) -> int:
        """Limit of a row's length."""
        return self.micro_batch_tokens if self.row_tokens is None else self.row_tokens

    def costs(self, lengths: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(n,) cost of each sample without padding, in tokens."""
        return self.sides * lengths + self.label_cost * labels

    def tokens(self, lengths: Sequence[int]) -> int:
        """Rows x longest row of a micro-batch."""
        if not len(lengths):
            return 0
        if self.layout == "padded":
            return self.sides * len(lengths) * max(lengths)
        if (total := sum(lengths)) <= self.longest_row:
            return total
        rows = self.rows(lengths)
        return len(rows) * max(sum(lengths[number] for number in row) for row in rows)

    def needed(self, lengths: Sequence[int]) -> int:
        """The smallest `micro_batch_tokens` that holds samples of these lengths: whole rows in the packed layout."""
        if self.layout == "padded":
            return self.tokens(lengths)
        if self.row_tokens is None or sum(lengths) <= self.row_tokens:
            return sum(lengths)
        return len(self.rows(lengths)) * self.row_tokens

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """The samples of each row, as indices into `lengths`.

        Packed: the number of rows whose rectangle is smallest, each row about equally long; a row is longer than
        `row_tokens` only if a single sample is.
        """
        if self.layout == "padded":
            return [[number] for number in range(len(lengths))]
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        descending = [lengths[number] for number in order]
        total = sum(lengths)
        best, tokens_of = best_fit(descending, self.longest_row)
        smallest = len(tokens_of) * int(max(tokens_of, default=0))
        fewest, most = max(-(-total // self.longest_row), 1), self.micro_batch_tokens // self.longest_row
        for n_rows in range(fewest, min(fewest + MOST_TRIES, len(tokens_of) + 2, most + 1)):
            if total >= WELL_FILLED * smallest:
                break
            row_of = evenly(descending, n_rows)
            longest = int(np.bincount(row_of, descending).max())
            if longest <= self.longest_row and n_rows * longest < smallest:
                best, smallest = row_of, n_rows * longest
        rows: dict[int, list[int]] = {}
        for number, row in sorted(zip(order, best, strict=True)):
            rows.setdefault(row, []).append(number)
        return list(rows.values())

    def surely_fit(self, totals: npt.NDArray[np.int64], longest: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether micro-batches of these totals and longest samples are within the budget; False: perhaps not.

        Packed: with as many equal rows as the budget holds, a row's length is at most the mean and a longest sample.
        """
        if self.layout == "padded":
            return np.zeros(len(totals), np.bool_)
        n_rows = self.micro_batch_tokens // self.longest_row
        return (totals <= self.longest_row) | (totals / n_rows + longest <= self.longest_row)


def evenly(costs: Sequence[float], n_bins: int) -> list[int]:
    """Distributes items over bins with a low largest load: the bin of each.

    Largest first; where bins get few items, that leaves loads apart, and MULTIFIT (Coffman, Garey and Johnson 1978)
    looks for a lower one: the smallest capacity, by bisection, at which best fit needs no more bins.

    Args:
        costs: of the items, in descending order.
    """
    bins, largest = largest_first(costs, n_bins)
    if not n_bins < len(costs) <= FEW_ITEMS * n_bins:
        return bins
    low = max(costs[0], costs[n_bins - 1] + costs[n_bins], sum(costs) / n_bins)  # no distribution is below it
    for _ in range(BISECTIONS if low < largest else 0):
        middle = (low + largest) / 2
        fitted, loads = best_fit(costs, middle)
        if len(loads) > n_bins:
            low = middle
        elif len(loads) == n_bins:
            bins, largest = fitted, max(loads)
        else:  # a bin would stay empty
            break
    return bins


def best_fit(lengths: Sequence[float], capacity: float) -> tuple[list[int], list[float]]:
    """Places items, longest first, each into the fullest bin that has room, or a new one. O(n log n).

    Args:
        lengths: of the items, in descending order; one above the capacity gets a bin of its own.

    Returns:
        The bin of each item, and the length of each bin.
    """
    room: list[tuple[float, int]] = []  # (free, bin), ascending
    bins: list[int] = []
    totals: list[float] = []
    for length in lengths:
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = capacity, len(totals)
            totals.append(0)
        bins.append(number)
        totals[number] += length
        insort(room, (free - length, number))
    return bins, totals


def largest_first(costs: Sequence[float], n_bins: int, loads: Sequence[float] | None = None) -> tuple[list[int], float]:
    """Distributes items over bins, each to the bin with the lowest load, then the fewest items, then the lowest number.

    With costs in descending order this is the LPT rule (Graham 1969): the largest load is at most 4/3 of the optimum.

    Args:
        costs: of the items, in the order of distribution.
        loads: of each bin at the start; by default 0.

    Returns:
        The bin of each item, and the largest load.
    """
    heap = sorted((load, 0, number) for number, load in enumerate(loads or [0] * n_bins))
    bins = []
    for cost in costs:
        load, n_items, number = heap[0]
        heapreplace(heap, (load + cost, n_items + 1, number))
        bins.append(number)
    return bins, max(load for load, _, _ in heap)
