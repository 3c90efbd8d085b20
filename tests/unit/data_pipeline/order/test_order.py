"""order.py: permutations are valid, close to uniform, and the same on every machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.order.order import mix64, order_key, places_at, row_at, shuffled_many
from data_pipeline.records import DataError

GOLDEN = "[6, 3, 9, 4, 0, 7, 1, 8, 10, 5, 2]"


def permutation(n: int, key: int) -> list[int]:
    keys = np.full(n, key, np.uint64)
    return shuffled_many(np.arange(n), np.full(n, n), keys).tolist()


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 7473])
def test_shuffled_is_a_permutation(n: int) -> None:
    for key in (0, 1, 2**63 - 1):
        assert sorted(permutation(n, key)) == list(range(n))


def shuffled(position: int, n: int, key: int) -> int:
    """One position alone."""
    return int(shuffled_many(np.array([position]), np.array([n]), np.array([key], np.uint64))[0])


def test_one_position_alone_is_that_of_the_permutation() -> None:
    assert [shuffled(position, 53, 99) for position in range(53)] == permutation(53, 99)


def test_one_call_handles_languages_of_different_sizes() -> None:
    sizes = np.array([1, 2, 53, 2**40])
    keys = np.array([5, 6, 7, 8], np.uint64)
    positions = np.array([0, 1, 52, 2**39])
    alone = [shuffled(*map(int, what)) for what in zip(positions, sizes, keys, strict=True)]
    assert shuffled_many(positions, sizes, keys).tolist() == alone


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8, 13])
def test_every_ordered_pair_of_rows_starts_an_epoch_equally_often(n: int) -> None:
    draws = 20_000
    keys = mix64(np.arange(1, draws + 1, dtype=np.uint64))
    first, second = (shuffled_many(np.full(draws, p), np.full(draws, n), keys) for p in (0, 1))
    counts = np.bincount(first * n + second, minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    seen = counts[~np.eye(n, dtype=bool)]
    degrees = len(seen) - 1
    chi_square = float(((seen - draws / len(seen)) ** 2).sum() / (draws / len(seen)))
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_each_epoch_visits_every_row_once_in_its_own_order() -> None:
    rows = np.arange(100, 131)
    epochs = [[row_at(rows, epoch * 31 + i, 7, "sw") for i in range(31)] for epoch in range(4)]
    assert all(sorted(epoch) == rows.tolist() for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_languages_and_seeds_have_their_own_orders() -> None:
    rows = np.arange(200)
    orders = {
        (seed, code): tuple(row_at(rows, i, seed, code) for i in range(200)) for seed in (0, 1) for code in ("sw", "th")
    }
    assert len(set(orders.values())) == 4


def test_a_language_with_one_row_repeats_it() -> None:
    assert {row_at(np.array([42]), cursor, 0, "sw") for cursor in (0, 1, 10**12)} == {42}


def test_no_rows_is_an_error_that_names_the_language() -> None:
    with pytest.raises(DataError, match="'sw' has no rows"):
        row_at(np.array([], np.int64), 0, 0, "sw")


def test_seek_is_fast_and_gives_the_row_of_that_epoch() -> None:
    rows = np.arange(10**6)
    start = time.process_time()
    far = row_at(rows, 10**15 + 3, 0, "sw")
    assert time.process_time() - start < 0.1
    cursors, sizes = np.arange(10**15, 10**15 + 8), np.full(8, 10**6)
    assert far == places_at(cursors, sizes, np.full(8, order_key(0, "sw"), np.uint64))[3]


def test_orders_are_the_same_in_another_process_and_in_every_version() -> None:
    program = (
        "import numpy as np; from data_pipeline.order.order import shuffled_many;"
        "print(shuffled_many(np.arange(11), np.full(11, 11), np.full(11, 2026, np.uint64)).tolist())"
    )
    root = Path(__file__).parents[4]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    # A literal: if these numbers change, no older run can be resumed.
    assert other.stdout.strip() == str(permutation(11, 2026)) == GOLDEN
