"""Scans all shards once and builds the arrays of the index, sorted for fast look-ups.

There is one entry per Record, in the order of sources, files and rows; `index.py` saves and opens the arrays.

A bad row keeps its place in the order of its language, as an entry marked `bad`, if its language is known: from the
row, from the source, or because its file has one language only. Otherwise it is only counted.

Shapes: N entries, L declared languages; a section is a (Split, language).
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.console import Progress
from data_pipeline.records import NO_LANGUAGE, BadRow, DataError, Record, Split, normalized, stable_hash
from data_pipeline.sources.formats import Lines
from data_pipeline.sources.sources import RecordReader

PROGRESS_ROWS = 1000  # rows between two reports of progress
PENDING = -2  # language of a bad row until the rest of its file has been read
COLUMNS = {
    "language": np.int16,
    "group": np.int64,
    "content": np.int64,
    "normalized": np.int64,
    "n_bytes": np.int32,
    "has_back": np.bool_,
    "bad": np.bool_,
    "shard": np.int32,
    "number": np.int64,
    "offset": np.int64,
    "length": np.int32,
}

Arrays = dict[str, npt.NDArray[Any]]


class Scan:
    """Collects one entry per Record: a few numbers, independent of the text's length."""

    def __init__(self, languages: Sequence[str], max_bad_rows: int) -> None:
        self.codes = {language: code for code, language in enumerate(languages)}
        self.columns = {name: array(np.dtype(kind).char.replace("?", "b")) for name, kind in COLUMNS.items()}
        self.keep = max_bad_rows + 1
        self.bad_rows: list[tuple[str, str]] = []  # the first `keep`
        self.bad_count = 0

    def read(self, shard: int, reader: RecordReader, progress: Progress) -> str:
        """Scans a shard; returns the hash of its content."""
        digest = hashlib.sha256()
        seen: set[int] = set()
        pending: list[int] = []
        append = [column.append for column in self.columns.values()]
        try:
            for read, (place, row) in enumerate(reader.shard.scan(digest), 1):
                if read % PROGRESS_ROWS == 0:
                    progress.advance(PROGRESS_ROWS)
                counted = False
                for language, result in reader.records(row, place):
                    if isinstance(result, BadRow):
                        if not counted:  # once per row, also if it is bad in several languages of the wide layout
                            self._count(result)
                            counted = True
                        code = PENDING if language is None else self.codes.get(language, NO_LANGUAGE)
                        if code == PENDING:
                            pending.append(len(self.columns["language"]))
                        entry: tuple[int, ...] = (code, -1, -1, -1, 0, False, True, shard, *place)
                    else:
                        code = self.codes[result.language]
                        seen.add(code)
                        entry = (code, *_measure(result), False, shard, *place)
                    for add, value in zip(append, entry, strict=True):
                        add(value)
        except OSError as error:
            raise DataError(f"{reader.shard.address}: cannot be read ({error})") from error
        only = seen.pop() if len(seen) == 1 else NO_LANGUAGE
        for entry_number in pending:
            self.columns["language"][entry_number] = only
        return digest.hexdigest()

    def _count(self, bad: BadRow) -> None:
        self.bad_count += 1
        if len(self.bad_rows) < self.keep:
            self.bad_rows.append((bad.origin, bad.reason))

    def arrays(self) -> Arrays:
        """The entries, without bad rows of unknown language."""
        whole: Arrays = {name: np.array(column).astype(COLUMNS[name]) for name, column in self.columns.items()}
        kept = whole["language"] >= 0
        return {name: values[kept] for name, values in whole.items()}


def _measure(record: Record) -> tuple[int, int, int, int, bool]:
    text, has_back = record.user_text, record.back is not None
    return stable_hash(record.group), stable_hash(text), stable_hash(normalized(text)), record.n_bytes, has_back


def lookups(
    arrays: Arrays, parallel: npt.NDArray[np.bool_], languages: Sequence[str], heldout_items: int, seed: int
) -> Arrays:
    """The held-out items, and the entries sorted by section and by (section, item).

    Args:
        parallel: (N,) which entries are texts of the parallel corpus.
    """
    group, bad, language = arrays["group"], arrays["bad"], arrays["language"]
    items = np.unique(group[~bad & ~parallel])
    if heldout_items and heldout_items >= len(items):
        raise DataError(f"heldout_items is {heldout_items}, but the sources have only {len(items)} items")
    chosen = heapq.nsmallest(heldout_items, items.tolist(), key=lambda item: stable_hash(seed, item))
    groups_heldout = np.sort(np.array(chosen, dtype=np.int64))
    split = np.isin(group, groups_heldout).astype(np.int8)
    split[parallel] = Split.PARALLEL
    section = split.astype(np.int64) * len(languages) + language
    edges = np.arange(len(Split) * len(languages) + 1)
    by_language = np.argsort(section, kind="stable")
    good = np.flatnonzero(~bad)
    by_group = good[np.lexsort((group[good], section[good]))]
    language_starts = np.searchsorted(section[by_language], edges)
    for code, name in enumerate(languages):
        if bad[by_language[language_starts[code] : language_starts[code + 1]]].all():
            whole = (language == code) & ~bad & ~parallel
            why = "all its items are held out" if whole.any() else "no source has a usable row in it"
            raise DataError(f"language {name!r} of data.languages has nothing to train on: {why}")
    return {
        "split": split,
        "groups_heldout": groups_heldout,
        "by_language": by_language,
        "language_starts": language_starts,
        "by_group": by_group,
        "group_starts": np.searchsorted(section[by_group], edges),
        "sorted_group": group[by_group],
    }


def check_columns(readers: Sequence[RecordReader]) -> None:
    """Raises DataError for a mapped column that no row of a source has, naming those of its first row."""
    for name in dict.fromkeys(reader.source.name for reader in readers):
        of_source = [reader for reader in readers if reader.source.name == name]
        nowhere = set.intersection(*(reader.unseen for reader in of_source))
        if nowhere and (rows := [(reader, found) for reader in of_source if (found := reader.shard.columns())]):
            reader, present = rows[0]
            raise DataError(
                f"{reader.shard.address}: source {name!r} maps column {min(nowhere)!r}, which no row of it has; the"
                f" columns of the first are {', '.join(map(repr, present))}"
            )


def check_lines(readers: Sequence[RecordReader]) -> None:
    """Raises DataError where the files of a source that are parallel line by line have different numbers of lines."""
    for name in dict.fromkeys(reader.source.name for reader in readers):
        files = [reader for reader in readers if reader.source.name == name and reader.source.file_languages]
        shards = [reader.shard for reader in files if isinstance(reader.shard, Lines)]
        lengths = {shard.address: shard.number_of_lines() for shard in shards}
        if len(set(lengths.values())) > 1:
            (one, shorter), (other, longer) = (pick(lengths.items(), key=lambda each: each[1]) for pick in (min, max))
            raise DataError(
                f"{one}: {shorter:,} lines, but {other} has {longer:,}; in source {name!r} line i of every file must be"
                " the same item"
            )


def check_rows(arrays: Arrays, readers: Sequence[RecordReader]) -> None:
    """Raises DataError for a source without usable rows, and for a mapped column that is empty in all of them."""
    good = {readers[shard].source.name for shard in np.unique(arrays["shard"][~arrays["bad"]])}
    for reader in readers:
        name, columns = reader.source.name, reader.source.columns.named()
        if name not in good:
            raise DataError(f"{reader.shard.address}: source {name!r} has no usable rows")
        filled = {what for other in readers if other.source.name == name for what in other.filled}
        if nowhere := sorted(reader.optional - filled):
            what = nowhere[0]
            raise DataError(f"source {name!r}: {what} is mapped to {columns[what]!r}, which no row of it has")


def refuse_bad(bad_rows: Sequence[tuple[str, str]], count: int, max_bad_rows: int) -> None:
    """Raises DataError, naming the first of `count` bad rows, if they are more than `max_bad_rows`."""
    if count > max_bad_rows:
        more = f" (and {count - 1} more)" if count > 1 else ""
        origin, reason = bad_rows[0]
        raise DataError(f"{origin}: {reason}{more}; max_bad_rows is {max_bad_rows}")
