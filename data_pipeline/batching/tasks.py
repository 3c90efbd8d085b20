"""Collates tokenised task samples into a padded micro-batch of an encoder.

With partners, a micro-batch holds n target texts, followed by their n sources in the same order.

Shapes: R rows, n of them targets; T tokens; C classes; N label units: rows (classification, qa), words (tagging)
or tokens to be predicted (text), in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batching.batch import (
    Batch,
    BatchShape,
    ClassTargets,
    ContrastSets,
    SpanTargets,
    TagTargets,
    TaskBatch,
    TaskLabels,
    TaskTargets,
    TokenTargets,
)
from data_pipeline.batching.grid import Layout
from data_pipeline.batching.packer import Collator
from data_pipeline.records import Sample
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.sample import SideLabels, TaskSample
from data_pipeline.tasks.tokenize import NO_ANSWER, NO_WORD, EncodedSide


@dataclass(frozen=True, slots=True)
class _Row:
    """One text of a micro-batch and its labels."""

    side: EncodedSide
    labels: SideLabels
    language: int  # of the sample, also for its source
    weight: float
    is_source: bool

    @property
    def n_units(self) -> int:
        return self.labels.n_units


class TaskCollator(Collator):
    """Pads one text per row.

    Args:
        pad_id: token id of padding.
        task: the kind of labels, and how words are pooled.
        paired: whether each sample has a source.
        has_token_types: whether the tokenizer distinguishes the two texts of a pair by token types.
    """

    counts: ClassVar[tuple[str, ...]] = ("target_labels", "source_labels", "pairs")

    def __init__(self, pad_id: int, task: TaskConfig, paired: bool, has_token_types: bool) -> None:
        self.pad_id = pad_id
        self.task = task
        self.paired = paired
        self.sides = 2 if paired else 1
        self.has_token_types = has_token_types

    def collate(self, rows: Sequence[Sequence[Sample]], layout: Layout, contrast: ContrastSets | None) -> TaskBatch:
        samples: list[TaskSample] = []
        for (sample,) in rows:
            assert isinstance(sample, TaskSample)  # made by TaskStage
            samples.append(sample)
        texts = self._rows(samples) or [self._placeholder(is_source=number > 0) for number in range(self.sides)]
        shape = (len(texts), max(len(row.side) for row in texts))
        input_ids = np.full(shape, self.pad_id, np.int64)
        attention_mask, token_type_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(texts):
            here = (number, slice(len(row.side)))
            input_ids[here], attention_mask[here], token_type_ids[here] = row.side.input_ids, 1, row.side.token_type_ids
        units = [row.n_units for row in texts]

        def of_units(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(np.repeat(values, units), dtype=dtype)

        targets = TaskTargets(
            labels=self._labels(texts, shape),
            n_pairs=len(texts) // 2 if self.paired else 0,
            label_is_source=of_units([row.is_source for row in texts], torch.bool),
            n_target_labels=sum(row.n_units for row in texts if not row.is_source),
            label_rows=of_units(list(range(len(texts))), torch.int64),
            gold=all(sample.gold for sample in samples),
        )
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            token_type_ids=torch.from_numpy(token_type_ids) if self.has_token_types else None,
            label_weights=of_units([row.weight for row in texts], torch.float32),
            label_languages=of_units([row.language for row in texts], torch.int64),
            targets=targets,
            samples=tuple(samples),
        )

    def blank(self, shape: BatchShape) -> TaskBatch:
        ids_RT = torch.zeros(shape.rows, shape.row_tokens, dtype=torch.int64)
        labels_N = torch.zeros(shape.labels, dtype=torch.int64)
        targets = TaskTargets(
            TokenTargets(labels_N, labels_N), n_pairs=shape.rows // 2,
            label_is_source=labels_N.bool(), n_target_labels=shape.labels, label_rows=labels_N, gold=True,
        )  # fmt: skip
        return Batch(
            input_ids=ids_RT, attention_mask=torch.ones_like(ids_RT), label_weights=labels_N.float(),
            label_languages=labels_N, targets=targets, samples=(),
        )  # fmt: skip

    def _rows(self, samples: Sequence[TaskSample]) -> list[_Row]:
        rows = [_Row(s.target, s.target_labels, s.language, 1.0, False) for s in samples]
        if self.paired:
            for sample in samples:
                if sample.source is None:
                    raise ValueError(f"{sample.id} has no source, and samples are paired")
                source, weight = sample.source, float(sample.source.counts)
                rows.append(_Row(source.side, source.labels, sample.language, weight, True))
        return rows

    def _placeholder(self, is_source: bool) -> _Row:
        one = np.zeros(1, np.int32)
        labels = SideLabels()
        if self.task.labels:
            labels = SideLabels(classes=np.zeros((1, len(self.task.labels)), np.float32))
        elif self.task.kind == "text":
            labels = SideLabels(positions=one, ids=one)
        side = EncodedSide(one + self.pad_id, one.astype(np.int8), one, one.astype(np.bool_), (0, 1), NO_ANSWER)
        return _Row(side, labels, 0, 0.0, is_source)

    def _labels(self, rows: Sequence[_Row], shape: tuple[int, int]) -> TaskLabels:
        """The labels of all rows; the type depends on the task."""
        kind = self.task.kind
        if kind == "qa":
            return SpanTargets(torch.tensor([row.side.span or NO_ANSWER for row in rows], dtype=torch.int64))
        if kind == "text":
            positions = np.concatenate([row.labels.positions for row in rows]).astype(np.int64)
            row_starts = np.repeat(np.arange(len(rows)) * shape[1], [row.n_units for row in rows])
            ids = np.concatenate([row.labels.ids for row in rows]).astype(np.int64)
            return TokenTargets(torch.from_numpy(positions + row_starts), torch.from_numpy(ids))
        classes = torch.from_numpy(np.concatenate([row.labels.classes for row in rows]))
        if kind == "classification":
            return ClassTargets(classes)
        return TagTargets(classes, torch.from_numpy(self._token_word(rows, shape)))

    def _token_word(self, rows: Sequence[_Row], shape: tuple[int, int]) -> npt.NDArray[np.int64]:
        token_word = np.full(shape, NO_WORD, np.int64)
        first_unit = 0
        for number, row in enumerate(rows):
            word = row.side.word_of_token.astype(np.int64)
            belongs = word != NO_WORD
            if self.task.word_pooling == "first":
                belongs &= np.diff(word, prepend=NO_WORD) != 0
            token_word[number, : len(word)][belongs] = (word - row.side.words[0] + first_unit)[belongs]
            first_unit += row.n_units
        return token_word
