"""Contamination: held-out texts that are also in training, under another id (or without one)."""

from __future__ import annotations

import numpy as np

from data_pipeline.records import Split
from data_pipeline.sources.index import DataIndex

CHUNK = 2**20  # entries compared at once


def contaminated_rows(index: DataIndex) -> list[tuple[int, int]]:
    """(held-out row, training row) for every held-out row whose text is also in training, in any language.

    A row's text is its `user_text`; texts are compared by `records.normalized`. Of several training rows, the first is
    given. One pass over the index's hashes; no text is read.
    """
    held = np.flatnonzero((index.split == Split.HELD_OUT) & ~index.bad)
    texts = np.unique(index.normalized[held])
    in_training: dict[int, int] = {}
    for start in range(0, len(index) if len(held) else 0, CHUNK):
        part = slice(start, start + CHUNK)
        hashes = index.normalized[part]
        found = texts[np.searchsorted(texts, hashes).clip(max=len(texts) - 1)] == hashes
        found &= (index.split[part] == Split.TRAIN) & ~index.bad[part]
        for row in np.flatnonzero(found).tolist():
            in_training.setdefault(int(hashes[row]), start + row)
    pairs = ((row, in_training.get(int(index.normalized[row]))) for row in held.tolist())
    return [(row, training) for row, training in pairs if training is not None]
