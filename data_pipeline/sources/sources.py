"""Opens a SourceConfig as shards, and converts their rows to Records according to its column map.

Rows come from `formats.py` and `tables.py`. A row that cannot be used gives a BadRow with file, line and reason.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import fsspec

from data_pipeline.config import OPTIONAL_COLUMNS, PLACEHOLDER, TEXT_COLUMNS, ColumnMap, SourceConfig
from data_pipeline.records import BadRow, Conversation, DataError, Message, Record, item_key
from data_pipeline.sources.cells import Cells, blank
from data_pipeline.sources.delimited import Delimited
from data_pipeline.sources.formats import JsonLines, Lines, Place, Row, Shard
from data_pipeline.sources.paths import literal_folders
from data_pipeline.sources.tables import HubSplit, Parquet, load_hub
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.rows import check_example, read_example
from data_pipeline.text.turns import read_turns, unsupported_fields

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "lines",
}


def open_source(source: SourceConfig, data_dir: Path | None, cache_dir: Path) -> list[Shard]:
    """The source's shards, the matches of a glob in sorted order, each checked for the mapped columns.

    Labels and back-translations may be missing in some files of a source, and in JSONL the columns of `_sparse` in
    some rows; `scan.py` checks that they exist somewhere.

    Args:
        cache_dir: folder of the memory-mapped copies of Parquet files.

    Raises:
        DataError: no file matches, the format is unknown, or a mapped column does not exist (names those that do).
    """
    mapped = [(what, name) for columns in source.column_maps().values() for what, name in columns.named().items()]
    wanted = tuple(dict.fromkeys(name for _, name in mapped))
    optional = {name for what, name in mapped if what in OPTIONAL_COLUMNS}
    if source.hub is not None:
        shards: list[Shard] = [_hub_shard(source, source.hub, data_dir, wanted)]
    else:
        shards = [_file_shard(source, path, data_dir, wanted, cache_dir) for path in _files(source, data_dir)]
    for number, shard in enumerate(shards):
        try:
            present = shard.columns()
        except OSError as error:
            raise DataError(f"{shard.address}: cannot be read ({error})") from error
        missing = [name for name in wanted if name not in present]
        may_lack = optional | _sparse(source) if isinstance(shard, JsonLines) else optional
        if present and (needed := [name for name in missing if name not in may_lack]):
            raise DataError(
                f"{shard.address}: source {source.name!r} maps column {needed[0]!r}, which is not there;"
                f" the columns are {', '.join(map(repr, present))}"
            )
        if isinstance(shard, Parquet | HubSplit):
            unsupported = {field for each in source.column_maps().values() for field in unsupported_fields(each)}
            kept = [name for name in wanted if name not in missing]
            shards[number] = replace(shard, wanted=(*kept, *sorted(unsupported.intersection(present).difference(kept))))
    return shards


def _sparse(source: SourceConfig) -> set[str]:
    """The mapped columns that a single row may lack, as any row of JSONL may lack a field.

    These are the columns of one language of the wide layout, and the columns that have a default.
    """
    defaults = {"system", "response_language"} | ({"language"} if source.language is not None else set())
    return {
        name
        for columns in source.column_maps().values()
        for what, name in columns.named().items()
        if what not in OPTIONAL_COLUMNS and (what in defaults or PLACEHOLDER in source.columns.named()[what])
    }


def _files(source: SourceConfig, data_dir: Path | None) -> list[str]:
    if isinstance(source.files, dict):
        return [_only(source, language, _matches(source, file, data_dir)) for language, file in source.files.items()]
    patterns = (source.files,) if isinstance(source.files, str) else source.files or ()
    return list(dict.fromkeys(name for pattern in patterns for name in _matches(source, pattern, data_dir)))


def _only(source: SourceConfig, language: str, names: Sequence[str]) -> str:
    if len(names) > 1:
        raise DataError(f"source {source.name!r}: {len(names)} files match files.{language}, which must name one")
    return names[0]


def _matches(source: SourceConfig, pattern: str, data_dir: Path | None) -> list[str]:
    """The files of a pattern, at least one."""
    if "{data_dir}" in pattern and data_dir is None:
        raise DataError(f"source {source.name!r}: files {pattern!r} names {{data_dir}}, but data_dir is not set")
    address = pattern.replace("{data_dir}", str(data_dir))
    if "://" in address:
        fs, path = fsspec.core.url_to_fs(address)
        names = fs.glob(literal_folders(path, fs.exists))
        matches = sorted(fs.unstrip_protocol(match) for match in names if fs.isfile(match))
    else:
        address = os.path.join(data_dir or "", address)
        names = sorted(glob.glob(literal_folders(address), recursive=True))
        matches = [name for name in names if os.path.isfile(name)]
    if not matches:
        hint = f"; it is a directory: name the files in it, as {address}/*.jsonl" if os.path.isdir(address) else ""
        raise DataError(f"source {source.name!r}: no file matches {address}{hint}")
    return matches


def _file_shard(
    source: SourceConfig, address: str, data_dir: Path | None, wanted: tuple[str, ...], cache_dir: Path
) -> Shard:
    suffix = Path(address).suffix.lower()
    kind = source.format if source.format != "auto" else FORMATS.get(suffix)
    if "://" in address:
        fs, path = fsspec.core.url_to_fs(address)
        details = fs.info(path)
        times = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
        name, identity = address, json.dumps({key: str(details[key]) for key in times if key in details})
    else:
        status = os.stat(address)
        name, identity = os.path.abspath(address), f"{status.st_size} bytes, {status.st_mtime_ns} ns"
        if data_dir is not None and Path(name).is_relative_to(data_dir.absolute()):
            name = Path(name).relative_to(data_dir.absolute()).as_posix()
    if source.quoting is not None and kind not in ("csv", "tsv"):
        raise DataError(f"{address}: source {source.name!r} has quoting: none, which goes with CSV and TSV, not {kind}")
    if kind == "parquet":
        return Parquet(address, name, identity, wanted, str(cache_dir))
    if kind == "jsonl":
        return JsonLines(address, name, identity)
    if kind == "lines":
        return Lines(address, name, identity)
    if kind is None:
        raise DataError(
            f"{address}: source {source.name!r} has format: auto, and the suffix {suffix!r} indicates no format;"
            " set format: jsonl, parquet, csv, tsv or lines (compressed text must be unpacked first)"
        )
    return Delimited(address, name, identity, "," if kind == "csv" else "\t", quoting=source.quoting != "none")


def _hub_shard(source: SourceConfig, hub: str, data_dir: Path | None, wanted: tuple[str, ...]) -> HubSplit:
    local = Path(data_dir or "", hub.replace("{data_dir}", str(data_dir)))
    path = str(local) if local.is_dir() else hub
    name = f"{hub}[{source.split}]" if source.hub_config is None else f"{hub}/{source.hub_config}[{source.split}]"
    identity = load_hub(path, source.hub_config, source.split)._fingerprint
    return HubSplit(name, name, identity, path, source.hub_config, source.split, wanted)


class RecordReader:
    """Converts the rows of one shard to Records of conversations or of a task, according to the column map.

    With `task`, rows must have the labels that training on the task needs (`tasks/rows.py`). A text of the parallel
    corpus (`parallel`) is read as a user's turn without an answer.
    """

    def __init__(
        self,
        source: SourceConfig,
        shard: Shard,
        languages: Sequence[str],
        task: TaskConfig | None = None,
        *,
        language: str | None = None,
        parallel: bool = False,
    ) -> None:
        """
        Args:
            language: the file's, where `source.files` names one file a language.
        """
        self.source = source
        self.shard = shard
        self.languages = frozenset(languages)
        self.task = task
        self.parallel = parallel
        self.language = language or source.language
        self.maps = source.column_maps()
        # a row lacks a translation if a cell of that language's own columns is empty; shared columns do not count
        self.own = {
            language: [
                columns.named()[what]
                for what, name in source.columns.named().items()
                if PLACEHOLDER in name and what in TEXT_COLUMNS
            ]
            for language, columns in self.maps.items()
        }
        self.stem = Path(shard.name).stem
        self.optional = OPTIONAL_COLUMNS & source.columns.named().keys()
        self.filled: set[str] = set()  # optional columns that the scan has found non-empty in some row
        # columns that a row may lack and that the scan has found in no row so far
        self.unseen = _sparse(source) if isinstance(shard, JsonLines) else set()

    def records(self, row: Row | BadRow, place: Place) -> Iterator[tuple[str | None, Record | BadRow]]:
        """Each (language, Record) of a row: one in the long layout, one per translation in the wide layout.

        A BadRow comes with the language in whose order it keeps its place, or None if the language is not known.
        """
        if self.unseen and not isinstance(row, BadRow):
            self.unseen.difference_update(row)
        empty = True
        for wide in self.maps:
            language = wide or (self.language if self.source.columns.language is None else None)
            try:
                if isinstance(row, BadRow):
                    raise row
                language = wide or self._language(Cells(row, self.shard.origin(place)))
                record = self.record(row, place, wide)
            except BadRow as bad:
                empty = False
                yield language, bad
            else:
                if record is not None:
                    empty = False
                    if len(self.filled) < len(self.optional):
                        names = self.maps[wide].named()
                        self.filled.update(what for what in self.optional if not blank(row.get(names[what])))
                    yield record.language, record
        if empty:
            yield (
                None,
                BadRow(self.shard.origin(place), f"no text in any language of {', '.join(map(str, self.maps))}"),
            )

    def record(self, row: Row, place: Place, wide: str | None) -> Record | None:
        """The Record of a row, in the wide layout of its language `wide`; None if it has none. Raises BadRow."""
        columns = self.maps[wide]
        if self.own[wide] and any(blank(row.get(name)) for name in self.own[wide]):
            return None
        cells = Cells(row, self.shard.origin(place))
        language = wide or self._language(cells)
        self._declared(language, cells)
        name = cells.name(columns.id)
        of_file = "" if self.source.file_languages is not None else f"/{self.shard.name}"
        group = cells.name(columns.group) or name or f"{self.source.name}{of_file}:{place.number}"
        group = item_key(group)
        id = name or f"{self.stem}:{place.number}"
        if self.parallel:
            sentence = Conversation((Message("user", cells.text(cast(str, columns.text))),), language)
            return Record(id, group, language, cells.origin, sentence, parallel=True)
        if columns.kind != "chat":
            example, back = read_example(cells, columns)
            if self.task is not None:
                check_example(example, self.task, cells.origin)
            return Record(id, group, language, cells.origin, example, back)
        response = cells.optional_text(columns.response_language) or self.source.response_language or language
        self._declared(response, cells)
        return Record(id, group, language, cells.origin, Conversation(_messages(cells, columns), response))

    def _language(self, cells: Cells) -> str:
        language = cells.optional_text(self.source.columns.language) or self.language
        if language is None:
            raise cells.bad(f"{self.source.columns.language!r} is empty; it must name the row's language")
        return language

    def _declared(self, language: str, cells: Cells) -> None:
        if language not in self.languages:
            declared = ", ".join(sorted(self.languages))
            raise cells.bad(f"language {language!r} is not declared; data.languages are {declared}")


def _messages(cells: Cells, columns: ColumnMap) -> tuple[Message, ...]:
    if columns.messages is not None:
        return read_turns(cells, columns)
    system = cells.optional_text(columns.system)
    prompt, completion = cast(str, columns.prompt), cast(str, columns.completion)  # checked by ColumnMap
    start = () if system is None else (Message("system", system),)
    question = Message("user", cells.text(prompt))
    return (*start, question, Message("assistant", cells.text(completion)))
