"""The data index: place, language, item and length of each Record, in memory-mapped arrays.

`order/` chooses rows by their numbers, and `reader.py` reads their Records through the index.

The index is a folder of arrays under the cache directory, named by a hash of everything it depends on (configs,
languages, files with sizes and times). It is built in one pass over the files (`scan.py`) and then renamed into
place, so several processes may build it at the same time, and later runs open it without reading any data.

Shapes: N entries, in the order of sources, files and rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.atomic import atomic_folder
from data_pipeline.config import SourceConfig
from data_pipeline.console import Progress
from data_pipeline.records import BadRow, DataError, Record, Split, stable_hash
from data_pipeline.sources.formats import Place, Row, Shard
from data_pipeline.sources.patience import retry_reading
from data_pipeline.sources.scan import (
    COLUMNS,
    Scan,
    check_columns,
    check_lines,
    check_rows,
    lookups,
    refuse_bad,
)
from data_pipeline.sources.sources import RecordReader, open_source
from data_pipeline.tasks.config import TaskConfig

VERSION = 2  # of the folder's layout and of the rules that determine its content
ARRAYS = (
    *COLUMNS,
    "split",
    "groups_heldout",
    "by_language",
    "language_starts",
    "by_group",
    "group_starts",
    "sorted_group",
)

Integers = npt.NDArray[np.int64]


class DataIndex:
    """An opened index. Cheap to pickle, as the arrays stay on disk."""

    def __init__(self, directory: Path, readers: Sequence[RecordReader], patience: float = 0.0) -> None:
        self.patience = patience  # seconds to wait for a file that cannot be read
        self._directory = directory
        self._readers = tuple(readers)
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.languages: tuple[str, ...] = tuple(meta["languages"])  # arrays hold indices into it
        self.fingerprint: dict[str, str] = meta["fingerprint"]  # hashes of content and settings, compared on resume
        self.bad_rows: tuple[tuple[str, str], ...] = tuple((origin, reason) for origin, reason in meta["bad_rows"])
        # as plain ndarrays: slicing a memmap object is slower
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS}
        self.language: npt.NDArray[np.int16] = arrays["language"]
        self.group: Integers = arrays["group"]  # stable_hash of Record.group: equal in translations of an item
        self.content: Integers = arrays["content"]  # stable_hash of Record.user_text
        self.normalized: Integers = arrays["normalized"]  # the same of `normalized(user_text)`
        self.n_bytes: npt.NDArray[np.int32] = arrays["n_bytes"]  # UTF-8 bytes of all texts
        self.has_back: npt.NDArray[np.bool_] = arrays["has_back"]  # the row has a back-translation
        self.bad: npt.NDArray[np.bool_] = arrays["bad"]  # the row is unusable and keeps its place in the order
        self.split: npt.NDArray[np.int8] = arrays["split"]  # `Split`
        self.groups_heldout: Integers = arrays["groups_heldout"]  # (items,), sorted
        self._shard: npt.NDArray[np.int32] = arrays["shard"]
        self._arrays = arrays
        sources = [reader.source.name for reader in self._readers]
        self._source_of_shard = np.array([sources.index(name) for name in sources])

    def __reduce__(self) -> tuple[Any, ...]:
        return DataIndex, (self._directory, self._readers, self.patience)

    def __len__(self) -> int:
        return len(self.language)

    def rows(self, language: int, split: Split = Split.TRAIN) -> Integers:
        """The entries of a language in one split, in file order, including bad ones: (rows,) int64."""
        return self._section("by_language", "language_starts", language, split)

    def translation(self, row: int, language: int) -> int:
        """`translations` of one entry."""
        return int(self.translations(np.array([row]), language)[0])

    def translations(self, rows: Integers, language: int) -> Integers:
        """The entry of the same item and split in `language` for each of `rows`, or -1: (rows,). O(rows log N).

        Of several entries the first of the same source, otherwise the first. Bad rows have no translation and are not
        returned as one.
        """
        found = np.full(len(rows), -1, np.int64)
        splits = self.split[rows]
        for split in Split:
            chosen = np.flatnonzero(splits == split)
            groups = self._section("sorted_group", "group_starts", language, split)
            entries = self._section("by_group", "group_starts", language, split)
            wanted = self.group[rows[chosen]]
            firsts, lasts = groups.searchsorted(wanted), groups.searchsorted(wanted, "right")
            there = lasts > firsts  # False also for bad rows, which have no group
            found[chosen[there]] = entries[firsts[there]]
            for place in np.flatnonzero(lasts > firsts + 1).tolist():
                same_item, source_of = entries[firsts[place] : lasts[place]], self._source_of_shard
                row = chosen[place]
                same_source = source_of[self._shard[same_item]] == source_of[self._shard[rows[row]]]
                found[row] = same_item[same_source.argmax()]
        return found

    def origin(self, row: int) -> str:
        """The place of an entry, such as "file.jsonl:17"; reads no data."""
        return self._readers[self._shard[row]].shard.origin(self._place(row))

    def source(self, row: int) -> SourceConfig:
        """The config of an entry's source."""
        return self._readers[self._shard[row]].source

    def record(self, row: int) -> Record:
        """Reads one entry from its file.

        Raises:
            BadRow: the row is unusable.
            DataError: the file has changed since it was indexed, or cannot be read.
        """
        (found,) = self.records([row])
        if isinstance(found, BadRow):
            raise found
        return found

    def records(self, rows: Sequence[int]) -> list[Record | BadRow]:
        """Reads entries from their files, those of one file together. Raises DataError."""
        by_shard: dict[int, list[int]] = {}
        for row in dict.fromkeys(rows):
            by_shard.setdefault(int(self._shard[row]), []).append(row)
        found: dict[int, Record | BadRow] = {}
        for number, together in by_shard.items():
            places = [self._place(row) for row in together]
            contents = self._contents(self._readers[number].shard, places)
            for row, place, content in zip(together, places, contents, strict=True):
                found[row] = self._record(row, place, content)
        return [found[row] for row in rows]

    def _contents(self, shard: Shard, places: list[Place]) -> list[Row | BadRow]:
        try:
            return shard.read_many(places)
        except OSError:
            contents = []
        for place in places:  # singly, with patience, and to say which cannot be read
            try:
                contents.append(retry_reading(partial(shard.read, place), shard.address, self.patience))
            except OSError as error:
                raise DataError(f"{shard.origin(place)}: cannot be read ({error})") from error
        return contents

    def _record(self, row: int, place: Place, content: Row | BadRow) -> Record | BadRow:
        reader = self._readers[self._shard[row]]
        wide = self.languages[self.language[row]] if reader.source.languages is not None else None
        try:
            if isinstance(content, BadRow):
                raise content
            record = reader.record(content, place, wide)
        except BadRow as bad:
            if self.bad[row]:
                return bad
            record = None
        if record is None or stable_hash(record.user_text) != self.content[row]:
            raise DataError(f"{reader.shard.origin(place)}: the file has changed since the run began; start again")
        return record

    def _place(self, row: int) -> Place:
        return Place(*(int(self._arrays[name][row]) for name in ("number", "offset", "length")))

    def _section(self, values: str, starts: str, language: int, split: Split) -> Integers:
        position = split * len(self.languages) + language
        first, last = self._arrays[starts][position : position + 2]
        return self._arrays[values][first:last]


def build_index(
    sources: Sequence[SourceConfig],
    languages: Sequence[str],
    data_dir: Path | None,
    cache_dir: Path,
    *,
    heldout_items: int = 0,
    seed: int = 0,
    max_bad_rows: int = 0,
    task: TaskConfig | None = None,
    pairs: Sequence[SourceConfig] = (),
    patience: float = 0.0,
) -> DataIndex:
    """Opens the index of the sources, and builds it first if no earlier run did.

    Args:
        heldout_items: items to hold out, in all their languages: those with the smallest hash of (seed, item).
        task: requires sources of this kind; a row without a label, or with one not in `task.labels`, is unusable.
        pairs: sources of the parallel corpus.
        patience: seconds that later reads wait for an unreadable file; building does not wait.

    Raises:
        DataError: a file or column does not exist, a source has no rows, a language has no training rows, or there
            are more than `max_bad_rows` unusable rows (names the first).
    """
    _check_languages([*sources, *pairs], languages)
    _check_kinds(sources, task)
    readers = [
        RecordReader(source, shard, languages, task, language=language, parallel=number >= len(sources))
        for number, source in enumerate([*sources, *pairs])
        for shard, language in _files(source, open_source(source, data_dir, cache_dir / "arrow"))
    ]
    settings = {
        "version": str(VERSION),
        "languages": " ".join(languages),
        "held out": f"{heldout_items} items, seed {seed}" if heldout_items else "none",
        "sources": " ".join(source.name for source in sources),
    }
    for kind, of_kind in (("source", sources), ("pairs", pairs)):
        for source in of_kind:
            settings[f"{kind} {source.name}"] = source.model_dump_json(exclude={"files"}, exclude_none=True)
    if task is not None:
        settings["task"] = f"{task.kind}: {' '.join(task.labels)}"
    shards = [(reader.source.name, reader.shard.address, reader.shard.identity) for reader in readers]
    # The names of the arrays are part of the folder's name, as the folder of another version may lack some. They do not
    # depend on the data, so they are not in the fingerprint that a resume compares.
    directory = cache_dir / hashlib.sha256(json.dumps([settings, shards, ARRAYS]).encode()).hexdigest()[:32]
    index = _opened(directory, readers)
    if index is None:
        _build(directory, readers, settings, languages, heldout_items, seed, max_bad_rows)
        index = DataIndex(directory, readers)
    refuse_bad(index.bad_rows, len(index.bad_rows), max_bad_rows)
    index.patience = patience
    return index


def _build(
    directory: Path,
    readers: Sequence[RecordReader],
    settings: dict[str, str],
    languages: Sequence[str],
    heldout_items: int,
    seed: int,
    max_bad_rows: int,
) -> None:
    """Scans all shards and writes the index."""
    scan = Scan(languages, max_bad_rows)
    with Progress("index", None, "rows") as progress:
        contents = {reader.shard.name: scan.read(number, reader, progress) for number, reader in enumerate(readers)}
    check_columns(readers)
    check_lines(readers)
    refuse_bad(scan.bad_rows, scan.bad_count, max_bad_rows)
    arrays = scan.arrays()
    try:
        check_rows(arrays, readers)
        parallel = np.array([reader.parallel for reader in readers])[arrays["shard"]]
        arrays |= lookups(arrays, parallel, languages, heldout_items, seed)
    except DataError as error:
        if not scan.bad_rows:
            raise
        first = BadRow(*scan.bad_rows[0])
        raise DataError(f"{error}; {scan.bad_count:,} rows are unusable, such as {first}") from None
    meta = {"languages": list(languages), "fingerprint": settings | contents, "bad_rows": scan.bad_rows}
    with atomic_folder(directory, exists="keep") as temporary:
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        # A complete folder was built by another process.
        if directory.exists() and _opened(directory, readers) is None:
            shutil.rmtree(directory)


def _opened(directory: Path, readers: Sequence[RecordReader]) -> DataIndex | None:
    try:
        return DataIndex(directory, readers)
    except (OSError, ValueError, KeyError):  # missing or incomplete: it is rebuilt
        return None


def _files(source: SourceConfig, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
    """Each shard with its language, where the source names one file a language."""
    languages = source.file_languages
    yield from zip(shards, languages or [None] * len(shards), strict=True)


def _check_kinds(sources: Sequence[SourceConfig], task: TaskConfig | None) -> None:
    """Raises DataError for a source whose columns do not match the task (conversations if there is none)."""
    labels = {"classification": ("label",), "tagging": ("tags", "soft_tags"), "qa": ("answers",)}
    for source in sources:
        kind, mapped = source.columns.kind, source.columns.named()
        if task is None:
            if kind != "chat":
                raise DataError(
                    f"source {source.name!r} has the columns of {kind}, so the run needs 'data.task' with that kind"
                )
        elif kind != task.kind:
            raise DataError(f"source {source.name!r} has the columns of {kind}, but data.task.kind is {task.kind!r}")
        elif (needed := labels.get(kind)) and not any(what in mapped for what in needed):
            raise DataError(f"source {source.name!r} maps no {' or '.join(needed)}, which training needs")


def _check_languages(sources: Sequence[SourceConfig], languages: Sequence[str]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are named {name!r}; each needs a unique name")
    for source in sources:
        for language in source.named_languages:
            if language not in languages:
                raise DataError(
                    f"source {source.name!r}: language {language!r} is not declared; data.languages are"
                    f" {', '.join(languages)}"
                )
