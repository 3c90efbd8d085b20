"""Text formats: a shard (one file) is scanned once from end to end and then read at any row.

Rows are dicts with their Place; a row that cannot be parsed is a BadRow. `tables.py` has Parquet files and hub
datasets.

Scan and random access use the same parser, so both see the same row. A shard keeps neither an open file nor a file
position: reading is safe in threads, after a fork and when pickled. No file is held in memory as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import fsspec

from data_pipeline.config import LINE
from data_pipeline.records import BadRow, DataError

if TYPE_CHECKING:
    from hashlib import _Hash

log = logging.getLogger(__name__)
BOM = "\ufeff"
_QUOTED_FIELD = re.compile(rb'(^|\t)"')
FIELD_LIMIT = 1 << 24  # characters of one CSV field: limits how much an unclosed quote can include

Row = dict[str, Any]


class Place(NamedTuple):
    """A row's place: its number in messages (the line; in tables the row; from 1), and two values for the shard."""

    number: int
    offset: int  # text: the row's first byte; Parquet: the batch; hub: the row
    length: int  # text: bytes; Parquet: the row within its batch


@dataclass(frozen=True)
class Shard(ABC):
    """One file or hub split."""

    address: str  # its address, also used in messages
    name: str  # independent of the data directory's place; part of ids, groups and fingerprints
    identity: str  # size and times: changes when the content may have changed

    @abstractmethod
    def columns(self) -> list[str]:
        """The shard's columns; for JSONL those of its first good row. Empty: no such row."""

    @abstractmethod
    def scan(self, digest: _Hash) -> Iterator[tuple[Place, Row | BadRow]]:
        """Every row in order, in one pass that also feeds the whole content to `digest`."""

    def read(self, place: Place) -> Row | BadRow:
        """One row alone, as the scan yielded it."""
        return self.read_many([place])[0]

    @abstractmethod
    def read_many(self, places: Sequence[Place]) -> list[Row | BadRow]:
        """Rows as the scan yielded them. All are read before any is parsed.

        A call to the file system releases the interpreter's lock and soon takes it back, before a waiting thread is
        awake; that thread then waits a whole switch interval again. One such call a row kept it waiting for the batch.
        """

    def origin(self, place: Place) -> str:
        return f"{self.address}:{place.number}"


class TextShard(Shard):
    """A file of lines, local or at any fsspec address."""

    @abstractmethod
    def rows(self, file: IO[bytes]) -> Iterator[tuple[Place, Row | BadRow]]:
        """The rows of an open file, from its beginning."""

    def columns(self) -> list[str]:
        with open_binary(self.address) as file:
            return next((list(row) for _, row in self.rows(file) if not isinstance(row, BadRow)), [])

    def scan(self, digest: _Hash) -> Iterator[tuple[Place, Row | BadRow]]:
        with open_binary(self.address) as source:
            yield from self.rows(io.BufferedReader(_Digesting(source, digest), 1 << 20))

    @abstractmethod
    def parse(self, content: bytes, place: Place) -> Row | BadRow:
        """The row of the bytes at a place."""

    def read_many(self, places: Sequence[Place]) -> list[Row | BadRow]:
        return [self.parse(content, place) for content, place in zip(self._bytes_at(places), places, strict=True)]

    def _bytes_at(self, places: Sequence[Place]) -> list[bytes]:
        if "://" in self.address:
            fs, path = fsspec.core.url_to_fs(self.address)
            starts = [place.offset for place in places]
            stops = [place.offset + place.length for place in places]
            return cast("list[bytes]", fs.cat_ranges([path] * len(places), starts, stops, on_error="raise"))
        with open(self.address, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), place.length, place.offset) for place in places]


class JsonLines(TextShard):
    """One JSON object a line. Blank lines are skipped."""

    def rows(self, file: IO[bytes]) -> Iterator[tuple[Place, Row | BadRow]]:
        offset = 0
        for number, line in enumerate(file, 1):
            place = Place(number, offset, len(line))
            offset += len(line)
            if not line.isspace():
                yield place, self.parse(line, place)

    def parse(self, content: bytes, place: Place) -> Row | BadRow:
        try:
            row = json.loads(content.decode().removeprefix(BOM).rstrip())
        except UnicodeDecodeError as error:
            reason = _not_utf8(content, error)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error})"
        else:
            if isinstance(row, dict):
                return row
            reason = f"a JSON {type(row).__name__}; each line must be one JSON object"
        return BadRow(self.origin(place), reason)


class Lines(TextShard):
    """One text a line, in the column `line`. Blank lines are skipped, and counted in the numbers of the others."""

    def rows(self, file: IO[bytes]) -> Iterator[tuple[Place, Row | BadRow]]:
        offset = 0
        for number, line in enumerate(file, 1):
            place = Place(number, offset, len(line))
            offset += len(line)
            if not line.isspace():
                yield place, self.parse(line, place)

    def parse(self, content: bytes, place: Place) -> Row | BadRow:
        try:
            return {LINE: content.decode().removeprefix(BOM).strip()}
        except UnicodeDecodeError as error:
            return BadRow(self.origin(place), _not_utf8(content, error))

    def number_of_lines(self) -> int:
        """Of the whole file, with blank ones."""
        with open_binary(self.address) as file:
            return sum(1 for _ in file)


class _Lines:
    """Decoded lines for the CSV parser; keeps the bytes of the current record.

    After an error only the record's first line is dropped and the others are parsed again, so that an unbalanced quote
    does not absorb the following rows.
    """

    def __init__(self, file: IO[bytes], at_start: bool) -> None:
        self.file = file
        self.at_start = at_start
        self.read_lines: list[bytes] = []
        self.unread_lines: deque[bytes] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.unread_lines.popleft() if self.unread_lines else next(self.file)
        self.read_lines.append(line)
        text = line.decode(errors="surrogateescape")  # RecordReader refuses text that was not UTF-8
        if self.at_start:
            text, self.at_start = text.removeprefix(BOM), False
        return text

    def unread(self) -> None:
        self.unread_lines.extendleft(reversed(self.read_lines[1:]))
        del self.read_lines[1:]


@dataclass(frozen=True)
class Delimited(TextShard):
    """CSV or TSV with a header line. Blank lines are skipped.

    With `quoting`, a field in quotes may contain delimiters and line breaks; without it, a quote is an ordinary
    character.
    """

    delimiter: str
    quoting: bool = True

    def rows(self, file: IO[bytes]) -> Iterator[tuple[Place, Row | BadRow]]:
        # In most corpora in TSV a quote is an ordinary character.
        records = self._records(file, Place(1, 0, 0), warn_of_quotes=self.quoting and self.delimiter == "\t")
        _, header = next(records, (None, []))
        if not isinstance(header, BadRow) and (encoding := _other_encoding(header)):
            raise DataError(f"{self.address}: {encoding}, where UTF-8 is needed; iconv -t UTF-8 converts it")
        if isinstance(header, BadRow) or len(set(header)) < len(header):
            raise DataError(f"{self.address}:1: not a header line, which must name each column once: {header}")
        for place, fields in records:
            yield place, self._row(header, fields, place)

    def parse(self, content: bytes, place: Place) -> Row | BadRow:
        records = self._records(io.BytesIO(content), place)
        _, fields = next(records, (place, BadRow(self.origin(place), "the line no longer exists")))
        return self._row(self._header, fields, place)

    @cached_property
    def _header(self) -> list[str] | BadRow:
        with open_binary(self.address) as file:
            return next(self._records(file, Place(1, 0, 0)))[1]

    def _records(
        self, file: IO[bytes], start: Place, warn_of_quotes: bool = False
    ) -> Iterator[tuple[Place, list[str] | BadRow]]:
        """Every record with its place. `warn_of_quotes`: warn once if a field begins with a quote."""
        csv.field_size_limit(FIELD_LIMIT)
        lines = _Lines(file, at_start=start.offset == 0)
        if self.quoting:
            parser = csv.reader(lines, delimiter=self.delimiter, strict=True)
        else:
            parser = csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE, strict=True)
        number, offset = start.number, start.offset
        fields: list[str] | BadRow
        while True:
            lines.read_lines.clear()
            try:
                fields = next(parser)
            except StopIteration:
                return
            except csv.Error as error:
                lines.unread()
                fields = BadRow(f"{self.address}:{number}", _reason(str(error), self.quoting))
            place = Place(number, offset, sum(map(len, lines.read_lines)))
            if warn_of_quotes and _QUOTED_FIELD.search(b"".join(lines.read_lines)):
                warn_of_quotes = False
                log.warning(
                    "%s:%d: a field begins with a quote, so it is read as CSV reads it: without its quotes; where "
                    "quotes are ordinary characters, set the source's quoting: none", self.address, number,
                )  # fmt: skip
            number, offset = number + len(lines.read_lines), offset + place.length
            if fields:
                yield place, fields

    def _row(self, header: list[str] | BadRow, fields: list[str] | BadRow, place: Place) -> Row | BadRow:
        if isinstance(fields, BadRow):
            return fields
        if isinstance(header, BadRow):
            return header
        if len(fields) != len(header):
            return BadRow(self.origin(place), f"{len(fields)} fields, but the header has {len(header)}")
        return dict(zip(header, fields, strict=True))


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{line[error.start]:02x}, number {error.start + 1} of the line)"


def _reason(error: str, quoting: bool) -> str:
    """The csv module's error message, in terms of the file."""
    if "field limit" in error:
        unclosed = "; is a quote not closed, or meant as a character (quoting: none)?" if quoting else ""
        return f"a field is longer than {FIELD_LIMIT:,} characters{unclosed}"
    if "new-line" in error:
        return "a carriage return without a line feed within the line; lines end with LF or CR LF"
    return (
        "wrongly quoted: a quoted field ends with the quote, and a quote within is doubled; where quotes are "
        "ordinary characters, set the source's quoting: none"
    )


def _other_encoding(header: list[str]) -> str | None:
    """The encoding that a header line suggests, if it is not UTF-8 or a subset or superset of it."""
    text = "".join(header).encode(errors="surrogateescape")
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16"
    return "is UTF-16 or not text (its first line holds NUL characters)" if b"\0" in text else None


class _Digesting(io.RawIOBase):
    """A stream that hashes everything read through it."""

    def __init__(self, source: IO[bytes], digest: _Hash) -> None:
        self.source = source
        self.digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.source.readinto(buffer)  # type: ignore[attr-defined]  # every binary file has it
        self.digest.update(memoryview(buffer)[:count])
        return count


def open_binary(address: str) -> IO[bytes]:
    if "://" in address:
        return cast("IO[bytes]", fsspec.open(address, "rb").open())
    return open(address, "rb")
