"""A sample of a task as tokens: its own text, and its source text where samples come with partners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.records import Sample, stable_hash
from data_pipeline.tasks.tokenize import EncodedSide


@dataclass(frozen=True, slots=True)
class SideLabels:
    """What is to be predicted on one side; an answer's span is in its EncodedSide.

    classes    (units, C) probabilities: classification, one unit; tagging, a unit a word of the window
    positions  (units,) text: tokens to be predicted
    ids        (units,) text: what they were
    """

    classes: npt.NDArray[np.float32] | None = None
    positions: npt.NDArray[np.int32] | None = None
    ids: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class SourceSide:
    """The partner of a sample, as tokens."""

    side: EncodedSide
    labels: SideLabels
    language: int
    is_gold: bool  # not a back-translation
    counts: bool  # its labels are right, so they are learned from
    is_itself: bool = False  # there was no other text, so the sample is its own source


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSample(Sample):
    """One window of a text, with its source where samples come with partners."""

    target: EncodedSide
    target_labels: SideLabels
    source: SourceSide | None = None
    gold: bool = True  # the step's sources are gold text, not back-translations

    def __len__(self) -> int:
        return len(self.target)

    @property
    def n_labels(self) -> int:
        positions = self.target_labels.positions
        return 0 if positions is None else len(positions)

    @property
    def row_length(self) -> int:
        return len(self) if self.source is None else max(len(self), len(self.source.side))

    def tokens_by_language(self) -> Iterator[tuple[int, int]]:
        yield self.language, len(self)
        if self.source is not None:
            yield self.source.language, len(self.source.side)

    def fingerprint(self) -> int:
        """Of the sample, the window, and the kind of source."""
        is_gold = self.source is not None and self.source.is_gold
        return stable_hash(self.language, self.id, self.target.words, is_gold, len(self))
