"""Text formats: a shard (one file) is scanned once from end to end and then read at any row.

Rows are dicts with their Place; a row that cannot be parsed is a BadRow. `delimited.py` has CSV and TSV, `tables.py`
Parquet files and hub datasets.

Scan and random access use the same parser, so both see the same row. A shard keeps neither an open file nor a file
position: reading is safe in threads, after a fork and when pickled. No file is held in memory as a whole.
"""

from __future__ import annotations

import io
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import fsspec

from data_pipeline.config import LINE
from data_pipeline.records import BadRow

if TYPE_CHECKING:
    from hashlib import _Hash

log = logging.getLogger(__name__)
BOM = "\ufeff"

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

    def rows(self, file: IO[bytes]) -> Iterator[tuple[Place, Row | BadRow]]:
        """The rows of an open file, from its beginning: each line is one, and blank lines are skipped."""
        offset = 0
        for number, line in enumerate(file, 1):
            place = Place(number, offset, len(line))
            offset += len(line)
            if not line.isspace():
                yield place, self.parse(line, place)

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
    """One JSON object a line."""

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
    """One text a line, in the column `line`."""

    def parse(self, content: bytes, place: Place) -> Row | BadRow:
        try:
            return {LINE: content.decode().removeprefix(BOM).strip()}
        except UnicodeDecodeError as error:
            return BadRow(self.origin(place), _not_utf8(content, error))

    def number_of_lines(self) -> int:
        """Of the whole file, with blank ones."""
        with open_binary(self.address) as file:
            return sum(1 for _ in file)


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{line[error.start]:02x}, number {error.start + 1} of the line)"


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
