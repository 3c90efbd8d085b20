"""CSV and TSV files, with or without quoting."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO

from data_pipeline.records import BadRow, DataError
from data_pipeline.sources.formats import BOM, Place, Row, TextShard, open_binary

log = logging.getLogger(__name__)
_QUOTED_FIELD = re.compile(rb'(^|\t)"')
FIELD_LIMIT = 1 << 24  # characters of one CSV field: limits how much an unclosed quote can include


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
