"""Packs the samples of one rank and step into micro-batches within a token budget, for every kind of row.

- `packed`: rows of at most `row_tokens` with several samples each. Position ids restart at each sample and there is
  no attention mask: attention is block-diagonal by position ids (or varlen, with a single row).
- `padded`: one text per row, right-padded, with an attention mask; correct for every model.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from data_pipeline.batching.batch import Batch, BatchShape, SampleUnit
from data_pipeline.records import Sample

log = logging.getLogger(__name__)
Layout = Literal["packed", "padded"]


@dataclass(slots=True)
class Bin:
    """The rows of one micro-batch while it is filled."""

    rows: list[list[Sample]] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)  # of each row
    units: list[SampleUnit] = field(default_factory=list)
    longest: int = 0  # tokens of its longest sample

    def add(self, unit: SampleUnit, places: Iterable[tuple[int, int]]) -> None:
        """Adds a unit. `places`: (sample, row), in the order in which samples are added."""
        for number, row in places:
            sample = unit.samples[number]
            if row == len(self.rows):
                self.rows.append([])
                self.row_tokens.append(0)
            self.rows[row].append(sample)
            self.row_tokens[row] += sample.row_length
            self.longest = max(self.longest, sample.row_length)
        self.units.append(unit)


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
            lengths = [sample.row_length for sample in unit.samples]
            if not lengths:
                continue
            for candidate in bins:
                places = self._place(candidate.row_tokens, candidate.longest, lengths, self.micro_batch_tokens)
                if places is not None:
                    break
            else:
                candidate = Bin()
                bins.append(candidate)
                places = self._place([], 0, lengths, self.micro_batch_tokens)
                if places is None:
                    places = self._place([], 0, lengths, None)
                    self._warn(unit)
            assert places is not None
            candidate.add(unit, places)
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
        row_tokens: Counter[int] = Counter()
        for number, row in self._place([], 0, lengths, None) or ():
            row_tokens[row] += lengths[number]
        return self.collator.sides * len(row_tokens) * max(row_tokens.values())

    def _warn(self, unit: SampleUnit) -> None:
        needed = self.tokens_alone([sample.row_length for sample in unit.samples])
        if needed > self.micro_batch_tokens:
            what = "a contrast set" if unit.pairs else unit.samples[0].id
            log.warning(
                "%s takes %d tokens %s, above micro_batch_tokens (%d); it runs alone",
                what, needed, self.layout, self.micro_batch_tokens,
            )  # fmt: skip

    def _place(
        self, row_tokens: Sequence[int], longest: int, lengths: Sequence[int], budget: int | None
    ) -> list[tuple[int, int]] | None:
        """The row of each further sample, (sample, row) in the order of placement; None if that exceeds the budget.

        Args:
            row_tokens: tokens of each row so far; a number beyond them is a new row.
            longest: tokens of the longest sample so far.
            lengths: row lengths of the further samples.
        """
        if self.layout == "padded":
            cost = self.collator.sides * (len(row_tokens) + len(lengths)) * max(longest, *lengths)
            fits = budget is None or cost <= budget
            return list(enumerate(range(len(row_tokens), len(row_tokens) + len(lengths)))) if fits else None
        places = []
        room = [self.row_tokens - tokens for tokens in row_tokens]
        for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
            fitting = [row for row, free in enumerate(room) if free >= lengths[number]]
            if fitting:
                row = min(fitting, key=lambda row: room[row])
            elif budget is None or (len(room) + 1) * self.row_tokens <= budget or not room:
                row = len(room)
                room.append(self.row_tokens)
            else:
                return None
            room[row] -= lengths[number]
            places.append((number, row))
        return places
