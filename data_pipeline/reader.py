"""Row numbers -> Samples: an index, and the text stage of its kind of rows.

A text stage turns a Record into a Sample. There are two: conversations (`text/stage.py`) and the tasks of encoders
(`tasks/stage.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.config import Overlong
from data_pipeline.order.pairing import Partners
from data_pipeline.order.plan import Slot
from data_pipeline.records import BadRow, DataError, Record, Sample
from data_pipeline.sources.index import DataIndex


class TextStage(ABC):
    """Record -> Sample, for one kind of rows. Safe to use from several threads."""

    sequence_length: int  # the longest sample, tokens
    overlong: Overlong

    @abstractmethod
    def length(self, record: Record) -> int:
        """Tokens of the whole record, however long; 0 where long texts are read in windows. Raises BadRow."""

    @abstractmethod
    def sample(self, record: Record, slot: Slot, partner: Record | None) -> Sample | None:
        """The sample of a record in a slot; None where it is too long and left out.

        Too long is longer than `sequence_length`; `overlong` says what becomes of it.

        Args:
            partner: the record of `slot.partner`, where that is a translation.

        Raises:
            BadRow: the record is unusable.
            DataError: it is too long, and `overlong` is "error".
        """

    @abstractmethod
    def describe(self, sample: Sample, uncut: int) -> Iterator[str]:
        """Lines for people: a header with its length (`uncut` before a cut), then its text with the labels marked."""

    def swapped_prompts(self, records: Sequence[Record]) -> list[Sample]:
        """Each record's answer behind the next one's prompt, as far as that fits. Of conversations only."""
        raise NotImplementedError(f"{type(self).__name__} reads no prompts")


class Readable(NamedTuple):
    """Of some rows, those that are usable and fit, their samples, and why others are not usable."""

    rows: list[int]
    samples: list[Sample]
    bad: list[BadRow]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the rows of an index as samples."""

    index: DataIndex
    stage: TextStage
    seed: int = 0
    partners: Partners | None = None  # chosen for the samples of fixed sets; in a step, the plan has chosen them

    def length(self, row: int) -> int:
        """Tokens of a row's own text, uncut; 0 where long ones are read in windows. Raises BadRow, DataError."""
        return self.stage.length(self.index.record(row))

    def read(self, slot: Slot) -> Sample | None:
        """The sample of a slot; None where it is too long and left out. Raises BadRow, DataError."""
        record = self.index.record(slot.row)
        partner = slot.partner
        other = self.index.record(partner.row) if partner is not None and partner.kind == "translation" else None
        return self.stage.sample(record, slot, other)

    def alone(self, row: int, step: int = 0) -> Slot:
        """The slot of a row of a fixed set, which is read as at `step`."""
        return Slot.alone(row, int(self.index.language[row]), self.seed, step, self.partners)

    def readable(self, rows: Sequence[int]) -> Readable:
        """Reads rows for a fixed set, which needs no slot of a step. Raises DataError."""
        found = Readable([], [], [])
        for row in rows:
            try:
                sample = self.read(self.alone(row))
            except BadRow as bad:
                found.bad.append(bad)
                continue
            if sample is not None:
                found.rows.append(row)
                found.samples.append(sample)
        return found


def overlong_error(origin: str, length: int, most: int) -> DataError:
    """Of a row that is too long, under `data.overlong: error`."""
    return DataError(
        f"{origin}: {length} tokens, data.sequence_length is {most}; shorten the row, raise data.sequence_length, or "
        "set data.overlong to drop or truncate"
    )
