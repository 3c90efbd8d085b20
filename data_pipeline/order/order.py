"""Stateless shuffling: the row of a language as a function of (seed, language, cursor).

The cursor is the number of earlier samples of the language. Every epoch visits each row once, each epoch in a
different order. See docs/methods.md, section 3.

A permutation of n rows is a Feistel network on the smallest power of two >= n (Luby & Rackoff 1988), applied again
until the result is below n (cycle walking, Black & Rogaway 2002): a bijection with O(1) seek and no memory.

Shapes: N places computed at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.records import DataError, stable_hash

Unsigned = npt.NDArray[np.uint64]

FEISTEL_ROUNDS = 16  # half-rounds; with 8, permutations of 5 to 8 rows are visibly not uniform
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: Unsigned) -> Unsigned:
    """SplitMix64's finaliser (Steele et al. 2014), (N,) -> (N,): a bijection that mixes all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffled_many(
    positions: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], keys: Unsigned
) -> npt.NDArray[np.int64]:
    """Maps each of `positions` (N,) through the permutation of range(size) given by its key.

    Requires 0 <= position < size and size <= 2**53.
    """
    bits = np.frexp((sizes - 1).astype(np.float64))[1].astype(np.uint64)  # exponent = bit length, exactly
    limits = sizes.astype(np.uint64)
    places = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(places >= limits)
    while outside.size:
        places[outside] = _feistel(places[outside], bits[outside], keys[outside])
        outside = outside[places[outside] >= limits[outside]]
    return places.astype(np.int64)


def _feistel(words: Unsigned, bits: Unsigned, keys: Unsigned) -> Unsigned:
    """A keyed bijection of `bits`-bit words. The halves may differ by one bit, so they are not swapped."""
    low_bits = (bits + np.uint64(1)) >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for _ in range(FEISTEL_ROUNDS // 2):
        keys = keys + _GOLDEN
        words = words ^ (mix64((words >> low_bits) + keys) & low_mask)
        keys = keys + _GOLDEN
        words = words ^ ((mix64((words & low_mask) + keys) << low_bits) & mask)
    return words


def order_key(seed: int, language: str) -> int:
    """The key of a language's order; from the code, not the index, so adding a language reorders no other language."""
    return stable_hash("order", seed, language)


def places_at(cursors: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], keys: Unsigned) -> npt.NDArray[np.int64]:
    """Places of rows within their languages, (N,).

    Args:
        cursors: (N,) number of earlier samples of the language.
        sizes: (N,) number of rows of the language.
        keys: (N,) `order_key` of the language.
    """
    epochs, positions = np.divmod(cursors, sizes)
    return shuffled_many(positions, sizes, mix64(keys + epochs.astype(np.uint64) * _GOLDEN))


def row_at(rows: npt.NDArray[np.int64], cursor: int, seed: int, language: str) -> int:
    """The row of a language after `cursor` samples: epoch cursor // n, position cursor % n.

    Args:
        rows: (n,) the language's row ids in file order.
        cursor: number of earlier samples of the language.

    Raises:
        DataError: the language has no rows.
    """
    if not len(rows):
        raise DataError(f"language '{language}' has no rows to draw from; give it a source")
    key = np.array([order_key(seed, language)], np.uint64)
    place = places_at(np.array([cursor], np.int64), np.array([len(rows)], np.int64), key)
    return int(rows[place[0]])
