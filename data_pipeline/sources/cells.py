"""The values of one row, requested by column and checked for their type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data_pipeline.records import BadRow
from data_pipeline.sources.formats import Row


@dataclass(frozen=True, slots=True)
class Cells:
    """One row and its origin."""

    row: Row
    origin: str  # "file.jsonl:17"

    def bad(self, reason: str) -> BadRow:
        return BadRow(self.origin, reason)

    def has(self, column: str | None) -> bool:
        """Whether a column is mapped, exists in the row and is not empty."""
        return column is not None and not blank(self.row.get(column))

    def value(self, column: str) -> Any:
        """The cell's value. Raises BadRow if the row has no such field."""
        if column not in self.row:
            raise self.bad(f"no field {column!r}; the row has {', '.join(map(repr, self.row))}")
        return self.row[column]

    def text(self, column: str) -> str:
        return self.checked(self.value(column), repr(column))

    def optional_text(self, column: str | None) -> str | None:
        """The text of a column that may be unmapped or empty in this row."""
        return self.text(column) if column is not None and self.has(column) else None

    def name(self, column: str | None) -> str | None:
        """An id, a group or a label: text or an integer. None if the column is not mapped."""
        if column is None:
            return None
        value = self.value(column)
        return str(value) if type(value) is int else self.checked(value, repr(column))

    def listed(self, column: str) -> Any:
        """A list or another nested value; CSV and TSV hold it as JSON. Raises BadRow."""
        value = self.value(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self.bad(f"{column!r} is not valid JSON ({error})") from None
        return value

    def checked(self, value: Any, what: str) -> str:
        """`value`, if it is text that is not empty. Raises BadRow naming `what`."""
        if blank(value):
            raise self.bad(f"{what} is empty")
        return self.unicode(value, what)

    def unicode(self, value: Any, what: str) -> str:
        """`value`, if it is text, empty or not. Raises BadRow naming `what`."""
        if not isinstance(value, str):
            raise self.bad(f"{what} is {type(value).__name__}; it must be text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.bad(f"{what} is not UTF-8") from None
        return value


def blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and (not value or value.isspace()))
