"""Sources: a SourceConfig opened as shards, and their rows turned into Records by its column map.

In: a SourceConfig and rows from `formats.py` and `tables.py`. Out: Records, or BadRow with
the file, the line and the reason. Next: `scan.py`, which does so once for every row, and `index.py`.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import fsspec

from data_pipeline.config import PLACEHOLDER, ColumnMap, SourceConfig
from data_pipeline.formats import Delimited, JsonLines, Place, Row, Shard
from data_pipeline.records import BadRow, DataError, Message, Record, Role
from data_pipeline.tables import HubSplit, Parquet, load_hub

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}


def open_source(source: SourceConfig, data_dir: Path | None, cache_dir: Path) -> list[Shard]:
    """The source's shards, globs in sorted order, each checked to have the mapped columns.

    `cache_dir` is where Parquet files get their memory-mapped copies. Raises DataError: no file matches, an
    unknown format, or a mapped column that is not there (naming those that are).
    """
    wanted = tuple(
        dict.fromkeys(name for columns in source.column_maps().values() for name in columns.named().values())
    )
    if source.hub is not None:
        shards: list[Shard] = [_hub_shard(source, source.hub, data_dir, wanted)]
    else:
        shards = [_file_shard(source, path, data_dir, wanted, cache_dir) for path in _files(source, data_dir)]
    for shard in shards:
        try:
            present = shard.columns()
        except OSError as error:
            raise DataError(f"{shard.address}: cannot be read ({error})") from error
        if present and (missing := [name for name in wanted if name not in present]):
            raise DataError(
                f"{shard.address}: source {source.name!r} maps column {missing[0]!r}, which is not there;"
                f" the columns are {', '.join(map(repr, present))}"
            )
    return shards


def _files(source: SourceConfig, data_dir: Path | None) -> list[str]:
    patterns = (source.files,) if isinstance(source.files, str) else source.files or ()
    found: dict[str, None] = {}  # in order, each once
    for pattern in patterns:
        if "{data_dir}" in pattern and data_dir is None:
            raise DataError(f"source {source.name!r}: files {pattern!r} names {{data_dir}}, but data_dir is not set")
        address = pattern.replace("{data_dir}", str(data_dir))
        if "://" in address:
            fs, path = fsspec.core.url_to_fs(address)
            matches = sorted(fs.unstrip_protocol(match) for match in fs.glob(path) if fs.isfile(match))
        else:
            address = os.path.join(data_dir or "", address)
            # a name that exists is taken as it is, brackets and all
            names = [address] if os.path.exists(address) else sorted(glob.glob(address, recursive=True))
            matches = [name for name in names if os.path.isfile(name)]
        if not matches:
            hint = f"; it is a directory: name the files in it, as {address}/*.jsonl" if os.path.isdir(address) else ""
            raise DataError(f"source {source.name!r}: no file matches {address}{hint}")
        found.update(dict.fromkeys(matches))
    return list(found)


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
    if kind == "parquet":
        return Parquet(address, name, identity, wanted, str(cache_dir))
    if kind == "jsonl":
        return JsonLines(address, name, identity)
    if kind is None:
        raise DataError(
            f"{address}: source {source.name!r} has format: auto, and the suffix {suffix!r} tells no format;"
            " set format: jsonl, parquet, csv or tsv (compressed text must be unpacked first)"
        )
    return Delimited(address, name, identity, "," if kind == "csv" else "\t")


def _hub_shard(source: SourceConfig, hub: str, data_dir: Path | None, wanted: tuple[str, ...]) -> HubSplit:
    local = Path(data_dir or "", hub.replace("{data_dir}", str(data_dir)))
    path = str(local) if local.is_dir() else hub
    name = f"{hub}[{source.split}]" if source.hub_config is None else f"{hub}/{source.hub_config}[{source.split}]"
    identity = load_hub(path, source.hub_config, source.split)._fingerprint
    return HubSplit(name, name, identity, path, source.hub_config, source.split, wanted)


class RecordReader:
    """Turns the rows of one shard into Records."""

    def __init__(self, source: SourceConfig, shard: Shard, languages: Sequence[str]) -> None:
        self.source = source
        self.shard = shard
        self.languages = frozenset(languages)
        self.maps = source.column_maps()
        # a translation is missing where a cell of its own columns is; shared columns say nothing about that
        self.own = {
            language: [
                columns.named()[what]
                for what, name in source.columns.named().items()
                if PLACEHOLDER in name and what in ("prompt", "completion", "messages")
            ]
            for language, columns in self.maps.items()
        }
        self.stem = Path(shard.name).stem

    def records(self, row: Row | BadRow, place: Place) -> Iterator[tuple[str | None, Record | BadRow]]:
        """Each (language, Record) of a row: one in the long layout, one a translation in the wide layout.

        A BadRow comes with the language whose place it keeps; None where nothing in the row tells it.
        """
        empty = True
        for wide in self.maps:
            language = wide or (self.source.language if self.source.columns.language is None else None)
            try:
                if isinstance(row, BadRow):
                    raise row
                language = wide or self._language(row, place)
                record = self.record(row, place, wide)
            except BadRow as bad:
                empty = False
                yield language, bad
            else:
                if record is not None:
                    empty = False
                    yield record.language, record
        if empty:
            yield (
                None,
                BadRow(self.shard.origin(place), f"no text in any language of {', '.join(map(str, self.maps))}"),
            )

    def record(self, row: Row, place: Place, wide: str | None) -> Record | None:
        """The Record of a row, in the wide layout that of the language `wide`, or None if it has none.

        Raises BadRow.
        """
        columns = self.maps[wide]
        if self.own[wide] and any(_blank(row.get(name)) for name in self.own[wide]):
            return None
        language = wide or self._language(row, place)
        self._declared(language, place)
        id = self._name(row, columns.id, place)
        group = self._name(row, columns.group, place) or id
        response = self._given(row, columns.response_language, place) or self.source.response_language or language
        self._declared(response, place)
        return Record(
            id=id or f"{self.stem}:{place.number}",
            group=group or f"{self.source.name}/{self.shard.name}:{place.number}",
            language=language,
            response_language=response,
            messages=self._messages(row, columns, place),
            origin=self.shard.origin(place),
        )

    def _bad(self, place: Place, reason: str) -> BadRow:
        return BadRow(self.shard.origin(place), reason)

    def _language(self, row: Row, place: Place) -> str:
        language = self._given(row, self.source.columns.language, place) or self.source.language
        if language is None:
            raise self._bad(place, f"{self.source.columns.language!r} is empty; it must name the row's language")
        return language

    def _declared(self, language: str, place: Place) -> None:
        if language not in self.languages:
            declared = ", ".join(sorted(self.languages))
            raise self._bad(place, f"language {language!r} is not declared; data.languages are {declared}")

    def _given(self, row: Row, column: str | None, place: Place) -> str | None:
        """The text of a column that may be unmapped, or empty in this row."""
        return None if column is None or _blank(row.get(column)) else self._text(row, column, place)

    def _name(self, row: Row, column: str | None, place: Place) -> str | None:
        """The row's id or group: text or an integer."""
        if column is None:
            return None
        value = self._cell(row, column, place)
        return str(value) if type(value) is int else self._checked(value, repr(column), place)

    def _text(self, row: Row, column: str, place: Place) -> str:
        return self._checked(self._cell(row, column, place), repr(column), place)

    def _cell(self, row: Row, column: str, place: Place) -> Any:
        if column not in row:
            raise self._bad(place, f"no field {column!r}; the row has {', '.join(map(repr, row))}")
        return row[column]

    def _checked(self, value: Any, what: str, place: Place) -> str:
        if _blank(value):
            raise self._bad(place, f"{what} is empty")
        if not isinstance(value, str):
            raise self._bad(place, f"{what} is {type(value).__name__}; it must be text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._bad(place, f"{what} is not UTF-8") from None
        return value

    def _messages(self, row: Row, columns: ColumnMap, place: Place) -> tuple[Message, ...]:
        system = self._given(row, columns.system, place)
        start = () if system is None else (Message("system", system),)
        if columns.messages is not None:
            return start + self._turns(row, columns.messages, place)
        prompt, completion = cast(str, columns.prompt), cast(str, columns.completion)  # the config's check
        question = Message("user", self._text(row, prompt, place))
        return (*start, question, Message("assistant", self._text(row, completion, place)))

    def _turns(self, row: Row, column: str, place: Place) -> tuple[Message, ...]:
        turns = self._cell(row, column, place)
        if isinstance(turns, str):  # CSV and TSV have no lists
            try:
                turns = json.loads(turns)
            except ValueError as error:
                raise self._bad(place, f"{column!r} is not valid JSON ({error})") from None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise self._bad(place, f"{column!r} must be a list of {{role, content}}")
        messages = []
        for number, turn in enumerate(turns):
            role = turn.get("role")
            if role not in get_args(Role):
                raise self._bad(place, f"{column!r}[{number}] has role {role!r}; it must be system, user or assistant")
            content = self._checked(turn.get("content"), f"{column!r}[{number}].content", place)
            messages.append(Message(cast(Role, role), content))
        if not messages or messages[-1].role != "assistant" or all(turn.role != "user" for turn in messages):
            raise self._bad(place, f"{column!r} must hold a user turn and end with the assistant's answer")
        return tuple(messages)


def _blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and (not value or value.isspace()))
