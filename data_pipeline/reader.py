"""Reads rows as Samples: an index, and a text stage for its kind of rows.

A text stage turns a Record into a Sample. There are two: for conversations (`text/stage.py`) and for the tasks of
encoders (`tasks/stage.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.config import Overlong
from data_pipeline.order.pairing import Partners
from data_pipeline.order.plan import FILL, Slot
from data_pipeline.records import BadRow, DataError, Record, Sample
from data_pipeline.sources.index import DataIndex

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

    @abstractmethod
    def length(self, record: Record) -> int:
        """Number of tokens without truncation; 0 if long texts are read in windows. Raises BadRow."""

    @abstractmethod
    def samples(self, items: Sequence[SlotRecord]) -> list[Outcome]:
        """The sample of each slot, tokenised together; its BadRow; or None, depending on `overlong`.

        Raises:
            DataError: a record is too long, and `overlong` is "error".
        """

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
        return self.stage.length(self.index.record(row))

    def read(self, slot: Slot) -> Sample | None:
        """The sample of a slot; None if it is too long and dropped. Raises BadRow, DataError."""
        (outcome,) = self.read_many([slot])
        if isinstance(outcome, BadRow):
            raise outcome
        return outcome

    def read_many(self, slots: Sequence[Slot]) -> list[Outcome]:
        """The sample of each slot, its BadRow, or None if it is too long and dropped. Raises DataError."""
        outcomes: list[Outcome] = [None] * len(slots)
        items: list[SlotRecord] = []
        places: list[int] = []
        for place, slot in enumerate(slots):
            try:
                items.append(self._record(slot))
                places.append(place)
            except BadRow as bad:
                outcomes[place] = bad
        for place, outcome in zip(places, self.stage.samples(items), strict=True):
            outcomes[place] = outcome
        return outcomes

    def _record(self, slot: Slot) -> SlotRecord:
        partner = slot.partner
        other = self.index.record(partner.row) if partner is not None and partner.kind == "translation" else None
        return SlotRecord(slot, self.index.record(slot.row), other)

    def alone(self, row: int, step: int = 0) -> Slot:
        """The slot of a row of a fixed set, which is read as in step `step`."""
        language = int(self.index.language[row])
        partner = None if self.partners is None else self.partners.of(row, language, step)
        return Slot(FILL, row, language, True, 0.0, partner, (self.seed, step))

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


def overlong_error(origin: str, length: int, most: int) -> DataError:
    """The error for a row that is too long, with `data.overlong: error`."""
    return DataError(
        f"{origin}: {length} tokens, data.sequence_length is {most}; shorten the row, raise data.sequence_length, or "
        "set data.overlong to drop or truncate"
    )
