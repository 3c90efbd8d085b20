"""Reads rows as Samples: an index, and a text stage for its kind of rows.

A text stage turns a Record into a Sample. There are two: for conversations (`text/stage.py`) and for the tasks of
encoders (`tasks/stage.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline.config import Overlong
from data_pipeline.order.pairing import Partners
from data_pipeline.order.plan import FILL, Slot
from data_pipeline.records import BadRow, DataError, Record, Sample, Split
from data_pipeline.sources.index import DataIndex
from data_pipeline.text.tokenizer import UnencodableText

BATCH_BYTES = 1 << 16  # of text that is tokenised in one call
Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")
Outcome = Sample | BadRow | None  # of a slot: None if its row is too long and dropped


class SlotRecord(NamedTuple):
    """A slot and its record."""

    slot: Slot
    record: Record
    partner: Record | None = None  # the record of `slot.partner`, if that is a translation


class TextStage(ABC):
    """Turns Records of one kind into Samples. Thread-safe."""

    sequence_length: int  # most tokens of a sample
    overlong: Overlong

    def lengths(self, records: Sequence[Record]) -> list[int | BadRow]:
        """Number of tokens of each record without truncation; 0 if long texts are read in windows."""
        return _together(self._lengths, records, lambda record: record.origin)

    def samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        """The sample of each slot, tokenised together; its BadRow; or None, depending on `overlong`.

        Raises:
            DataError: a record is too long, and `overlong` is "error".
        """
        return _together(self._samples, items, lambda item: item.record.origin)

    @abstractmethod
    def _lengths(self, records: Sequence[Record]) -> list[int | BadRow]:
        """See `lengths`. Raises UnencodableText."""

    @abstractmethod
    def _samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        """See `samples`. Raises UnencodableText."""

    @abstractmethod
    def describe(self, sample: Sample, uncut: int) -> Iterator[str]:
        """Lines to print: a header with the length (and `uncut`, the length before truncation), the marked text."""

    def swapped_prompts(self, records: Sequence[Record]) -> list[Sample]:
        """Each record's answer after the next record's prompt, without those that are too long. Conversations only."""
        raise NotImplementedError(f"{type(self).__name__} reads no prompts")


class Readable(NamedTuple):
    """The rows that are usable and not too long, their samples, and the errors of unusable rows."""

    rows: list[int]
    samples: list[Sample]
    bad: list[BadRow]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the rows of an index as samples."""

    index: DataIndex
    stage: TextStage
    seed: int = 0
    partners: Partners | None = None  # for samples of fixed sets; in a step, the plan chooses partners

    def length(self, row: int) -> int:
        """Number of tokens of a row's own text without truncation; 0 if long texts are read in windows.

        Raises BadRow, DataError.
        """
        return _raised(next(self.lengths([row])))

    def lengths(self, rows: Sequence[int]) -> Iterator[int | BadRow]:
        """The same of many rows, or their BadRow, read in batches. Raises DataError."""
        for batch in self._batches(rows, rows):
            yield from _answered(self.stage.lengths, self.index.records(batch))

    def read(self, slot: Slot) -> Sample | None:
        """The sample of a slot; None if it is too long and dropped. Raises BadRow, DataError."""
        return _raised(self.read_many([slot])[0])

    def read_many(self, slots: Sequence[Slot]) -> list[Outcome]:
        """The sample of each slot, its BadRow, or None if it is too long and dropped. Raises DataError."""
        batches = self._batches(slots, [slot.row for slot in slots])
        return [outcome for batch in batches for outcome in _answered(self.stage.samples, self._records(batch))]

    def _records(self, slots: Sequence[Slot]) -> list[SlotRecord | BadRow]:
        partners = [
            slot.partner.row if slot.partner is not None and slot.partner.kind == "translation" else None
            for slot in slots
        ]
        rows = [*(slot.row for slot in slots), *(row for row in partners if row is not None)]
        of_row = dict(zip(rows, self.index.records(rows), strict=True))
        found: list[SlotRecord | BadRow] = []
        for slot, partner in zip(slots, partners, strict=True):
            record, other = of_row[slot.row], None if partner is None else of_row[partner]
            if isinstance(other, BadRow):
                found.append(other)
            elif isinstance(record, BadRow):
                found.append(record)
            else:
                found.append(SlotRecord(slot, record, other))
        return found

    def _batches(self, items: Sequence[Item], rows: Sequence[int]) -> Iterator[Sequence[Item]]:
        """Splits `items`, which belong to `rows`, in batches of about BATCH_BYTES of text."""
        if len(rows):
            numbers = np.cumsum(self.index.n_bytes[rows], dtype=np.int64) // BATCH_BYTES
            edges = np.flatnonzero(np.diff(numbers)) + 1
            for start, stop in pairwise([0, *edges.tolist(), len(rows)]):
                yield items[start:stop]

    def alone(self, row: int, step: int = 0) -> Slot:
        """The slot of a row of a fixed set, which is read as in step `step`."""
        language = int(self.index.language[row])
        partner = None if self.partners is None else self.partners.of(row, language, step)
        labelled = self.index.split[row] != Split.PARALLEL
        return Slot(FILL, row, language, bool(labelled), partner, (self.seed, step))

    def readable(self, rows: Sequence[int]) -> Readable:
        """Reads the rows of a fixed set. Raises DataError."""
        found = Readable([], [], [])
        for row, outcome in zip(rows, self.read_many([self.alone(row) for row in rows]), strict=True):
            if isinstance(outcome, BadRow):
                found.bad.append(outcome)
            elif outcome is not None:
                found.rows.append(row)
                found.samples.append(outcome)
        return found


def _answered(
    answer: Callable[[Sequence[Read]], Sequence[Result]], found: Sequence[Read | BadRow]
) -> list[Result | BadRow]:
    """What `answer` says of what was read, and the BadRow of what could not be."""
    answers = iter(answer([each for each in found if not isinstance(each, BadRow)]))
    return [each if isinstance(each, BadRow) else next(answers) for each in found]


def _together(
    work: Callable[[Sequence[Item]], list[Result | BadRow]], items: Sequence[Item], origin: Callable[[Item], str]
) -> list[Result | BadRow]:
    """`work` on all items; item by item if a text among them cannot be encoded, which only then is known."""
    try:
        return work(items)
    except UnencodableText as error:
        if len(items) == 1:
            return [BadRow(origin(items[0]), str(error))]
    return [result for item in items for result in _together(work, [item], origin)]


def _raised(outcome: Result | BadRow) -> Result:
    if isinstance(outcome, BadRow):
        raise outcome
    return outcome


def overlong_error(origin: str, length: int, most: int) -> DataError:
    """The error for a row that is too long, with `data.overlong: error`."""
    return DataError(
        f"{origin}: {length} tokens, data.sequence_length is {most}; shorten the row, raise data.sequence_length, or "
        "set data.overlong to drop or truncate"
    )
