"""A tokenised sample of a task: its target text, and its source text if the objective uses partners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.records import Sample, stable_hash
from data_pipeline.tasks.tokenize import EncodedSide


@dataclass(frozen=True, slots=True)
class SideLabels:
    """Labels of one side; the span of an answer is in its EncodedSide."""

    # (units, C) probabilities; classification: one unit; tagging: one unit per word of the window
    classes: npt.NDArray[np.float32] | None = None
    positions: npt.NDArray[np.int32] | None = None  # (units,) text: positions of the tokens to be predicted
    ids: npt.NDArray[np.int32] | None = None  # (units,) text: the original tokens at these positions

    @property
    def n_units(self) -> int:
        """Number of label units."""
        if self.positions is not None:
            return len(self.positions)
        return 1 if self.classes is None else len(self.classes)


@dataclass(frozen=True, slots=True)
class SourceSide:
    """The tokenised partner of a sample."""

    side: EncodedSide
    labels: SideLabels
    language: int  # index of its language
    is_gold: bool  # False for a back-translation
    counts: bool  # its labels are correct and contribute to the loss
    is_itself: bool = False  # the row has no other text, so the sample is its own source


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSample(Sample):
    """One window of a text, with its source if the objective uses partners."""

    target: EncodedSide
    target_labels: SideLabels
    source: SourceSide | None = None
    gold: bool = True  # the step prefers gold sources to back-translations

    def __len__(self) -> int:
        return len(self.target)

    @property
    def n_labels(self) -> int:
        positions = self.target_labels.positions
        return 0 if positions is None else len(positions)

    @property
    def row_length(self) -> int:
        return len(self) if self.source is None else max(len(self), len(self.source.side))

    def counts(self) -> dict[str, int]:
        of_source = 0 if self.source is None else self.source.labels.n_units * self.source.counts
        of_target = self.target_labels.n_units
        return {"target_labels": of_target, "source_labels": of_source, "pairs": int(self.source is not None)}

    def tokens_by_language(self) -> Iterator[tuple[int, int]]:
        yield self.language, len(self)
        if self.source is not None:
            yield self.source.language, len(self.source.side)

    def fingerprint(self) -> int:
        """Hash of the sample, the window and the kind of source."""
        is_gold = self.source is not None and self.source.is_gold
        return stable_hash(self.language, self.id, self.target.words, is_gold, len(self))
