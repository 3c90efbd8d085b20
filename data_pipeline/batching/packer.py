"""Builds the micro-batches of one rank from its samples, for every kind of row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from data_pipeline.batching.batch import Batch, BatchShape, ContrastSets
from data_pipeline.batching.grid import Grid, Layout
from data_pipeline.records import Sample


class Collator(ABC):
    """Builds the tensors of a micro-batch; there is one implementation for each kind of row."""

    counts: ClassVar[tuple[str, ...]]  # names of `Sample.counts`; the first counts the labels whose loss is reported
    sides: int = 1  # rows per sample in the padded layout: 2 with partners

    @abstractmethod
    def collate(self, rows: Sequence[Sequence[Sample]], layout: Layout, contrast: ContrastSets | None) -> Batch[Any]:
        """The micro-batch of these rows; without rows the idle one, with one token per row and no label."""

    @abstractmethod
    def blank(self, shape: BatchShape) -> Batch[Any]:
        """A micro-batch of this shape without content, for memory estimates."""


class Packer:
    """Places samples in the rows of micro-batches and collates them.

    Args:
        grid: how samples share rows.
        collator: builds the tensors.
    """

    def __init__(self, grid: Grid, collator: Collator) -> None:
        self.grid = grid
        self.collator = collator

    @property
    def layout(self) -> Layout:
        return self.grid.layout

    def batch(self, samples: Sequence[Sample]) -> Batch[Any]:
        """One micro-batch of all these samples, without contrast sets; of none: the idle one."""
        return self.collate(samples, self.rows(samples), None)

    def rows(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The samples of each row, as indices."""
        return self.grid.rows([sample.row_length for sample in samples])

    def collate(
        self, samples: Sequence[Sample], rows: Sequence[Sequence[int]], contrast: ContrastSets | None
    ) -> Batch[Any]:
        """The micro-batch of samples in these rows."""
        return self.collator.collate([[samples[number] for number in row] for row in rows], self.layout, contrast)

    def idle(self) -> Batch[Any]:
        """A micro-batch of one token per row without label or language, for ranks without samples."""
        return self.batch([])

    def one_by_one(self, batch: Batch[Any]) -> Batch[Any]:
        """The samples of a micro-batch in the padded layout."""
        return Packer(replace(self.grid, layout="padded"), self.collator).batch(batch.samples)
