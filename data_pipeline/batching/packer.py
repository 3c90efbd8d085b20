"""Packs the samples of one rank and step into micro-batches within a token budget, for every kind of row.

- `packed`: rows of at most `row_tokens` with several samples each. Position ids restart at each sample and there is
  no attention mask: attention is block-diagonal by position ids (or varlen, with a single row).
- `padded`: one text per row, right-padded, with an attention mask; correct for every model.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from data_pipeline.batching.batch import Batch, BatchShape, SampleUnit
from data_pipeline.records import Sample

log = logging.getLogger(__name__)
Layout = Literal["packed", "padded"]


class HasRowLength(Protocol):
    """What placement requires of a sample; implemented by `Sample`."""

    @property
    def row_length(self) -> int: ...


Item = TypeVar("Item", bound=HasRowLength)


@dataclass(frozen=True, slots=True)
class Blank:
    """A placeholder for a sample of this length."""

    row_length: int


@dataclass(slots=True)
class Bin:
    """The rows of one micro-batch while it is filled."""

    rows: list[list[Sample]] = field(default_factory=list)
    units: list[SampleUnit] = field(default_factory=list)
    longest: int = 0  # tokens of its longest sample


class Collator(ABC):
    """Builds the tensors of a micro-batch; there is one implementation for each kind of row."""

    counts: ClassVar[tuple[str, ...]]  # names in `Batch.counts`
    sides: int = 1  # rows per sample in the padded layout: 2 with partners

    @abstractmethod
    def collate(self, filled: Bin, layout: Layout) -> Batch[Any]:
        """The micro-batch of these rows; for an empty bin the idle one, with one token per row and no label."""

    @abstractmethod
    def blank(self, shape: BatchShape) -> Batch[Any]:
        """A micro-batch of this shape without content, for memory estimates."""


class Packer:
    """Packs units into micro-batches, as a pure function of the units and the budget.

    Args:
        layout: "packed" or "padded".
        micro_batch_tokens: limit of rows x row length of a micro-batch.
        row_tokens: longest row of the packed layout (varlen attention: the whole micro-batch in one row).
        collator: builds the tensors.
    """

    def __init__(self, layout: Layout, micro_batch_tokens: int, row_tokens: int, collator: Collator) -> None:
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens
        self.row_tokens = min(row_tokens, micro_batch_tokens)
        self.collator = collator

    def pack(self, units: Sequence[SampleUnit]) -> list[Batch[Any]]:
        """First-fit decreasing over units; a unit above the budget gets its own micro-batch."""
        bins: list[Bin] = []
        for unit in sorted(units, key=lambda unit: -unit.n_tokens):
            if not unit.samples:
                continue
            for candidate in bins:
                rows = self._place(candidate.rows, candidate.longest, unit.samples, self.micro_batch_tokens)
                if rows is not None:
                    break
            else:
                candidate = Bin()
                bins.append(candidate)
                rows = self._place([], 0, unit.samples, self.micro_batch_tokens)
                if rows is None:
                    rows = self._place([], 0, unit.samples, None)
                    self._warn(unit)
            assert rows is not None
            candidate.rows = rows
            candidate.longest = max(candidate.longest, _longest(unit.samples))
            candidate.units.append(unit)
        return [self.collator.collate(each, self.layout) for each in bins]

    def idle(self) -> Batch[Any]:
        """A micro-batch of one token per row without label or language, for ranks with fewer micro-batches."""
        return self.collator.collate(Bin(), self.layout)

    def one_by_one(self, batch: Batch[Any]) -> Batch[Any]:
        """The samples of a micro-batch in the padded layout; for an idle micro-batch an idle one."""
        padder = Packer("padded", sys.maxsize, self.row_tokens, self.collator)
        return padder.pack(batch.units)[0] if batch.units else padder.idle()

    def tokens_alone(self, lengths: Sequence[int]) -> int:
        """Rows x longest row of a micro-batch of samples of these lengths."""
        rows = self._place([], 0, list(map(Blank, lengths)), None)
        assert rows is not None
        return self.collator.sides * len(rows) * max(map(_row_tokens, rows))

    def _warn(self, unit: SampleUnit) -> None:
        needed = self.tokens_alone([sample.row_length for sample in unit.samples])
        if needed > self.micro_batch_tokens:
            what = "a contrast set" if unit.pairs else unit.samples[0].id
            log.warning(
                "%s takes %d tokens %s, above micro_batch_tokens (%d); it runs alone",
                what, needed, self.layout, self.micro_batch_tokens,
            )  # fmt: skip

    def _place(
        self, rows: list[list[Item]], longest: int, samples: Sequence[Item], budget: int | None
    ) -> list[list[Item]] | None:
        """The rows, whose longest sample has `longest` tokens, with `samples` added; None if that exceeds the budget.

        Only lengths are used. In the padded layout a full micro-batch is rejected without reading its rows.
        """
        if self.layout == "padded":
            cost = self.collator.sides * (len(rows) + len(samples)) * max(longest, _longest(samples))
            return [*rows, *([sample] for sample in samples)] if budget is None or cost <= budget else None
        placed = [list(row) for row in rows]
        room = [self.row_tokens - _row_tokens(row) for row in placed]
        for sample in sorted(samples, key=lambda sample: sample.row_length, reverse=True):
            length = sample.row_length
            fitting = [index for index, free in enumerate(room) if free >= length]
            if fitting:
                best = min(fitting, key=lambda index: room[index])
                placed[best].append(sample)
                room[best] -= length
            elif budget is None or (len(placed) + 1) * self.row_tokens <= budget or not placed:
                placed.append([sample])
                room.append(self.row_tokens - length)
            else:
                return None
        return placed


def _longest(samples: Sequence[HasRowLength]) -> int:
    return max(sample.row_length for sample in samples)


def _row_tokens(row: Sequence[HasRowLength]) -> int:
    return sum(sample.row_length for sample in row)
