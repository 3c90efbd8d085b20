"""Task samples of one rank and step -> micro-batches within a token budget.

In: the TaskSamples that `reader.py` read for this rank. Out: TaskBatches of tensors, padded. Next:
`training.loop.trainer`.

With pairs, a micro-batch is its n target texts and, below them in the same order, their n sources.

Shapes: R rows, n of them targets; T tokens; C classes; N label units: rows (classification, qa), words (tagging)
or tokens to be predicted (text), in the order of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tasks.tokenize import NO_ANSWER, NO_WORD, EncodedSide

log = logging.getLogger(__name__)


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
class TaskSample:
    """One sample of a step, with its source where samples are paired."""

    id: str
    language: int  # of the target
    group: int  # stable_hash of TaskRecord.group
    target: EncodedSide
    target_labels: SideLabels
    source: EncodedSide | None = None
    source_labels: SideLabels | None = None
    source_language: int = -1
    source_is_gold: bool = False  # not a back-translation
    source_counts: bool = False  # its labels are right, so they are learned from
    unpaired: bool = False  # nothing to pair with was there, so it is its own source
    truncated: bool = False  # its own texts were cut to fit

    def __len__(self) -> int:
        """Tokens of the target."""
        return len(self.target)


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """What one forward pass of an encoder reads. A micro-batch always holds at least one row and one label unit.

    `label_positions` index the flattened (R*T) states. `token_word` says which label unit a token belongs to; with
    pooling "first" only a word's first token does.
    """

    input_ids: Tensor  # (R, T) int64
    attention_mask: Tensor  # (R, T) int64
    token_type_ids: Tensor | None  # (R, T) int64, where the tokenizer has them
    n_pairs: int  # rows [0, n) are targets and [n, 2n) their sources; 0: not paired
    row_languages: Tensor  # (R,) int64
    label_weights: Tensor  # (N,) float32: 1, or 0 where a label is not learned from
    label_languages: Tensor  # (N,) int64: the target's language, on both sides
    label_is_source: Tensor  # (N,) bool
    label_classes: Tensor | None  # (N, C) float32 probabilities: classification, tagging
    label_spans: Tensor | None  # (N, 2) int64, first and last token: qa
    label_positions: Tensor | None  # (N,) int64: text
    label_ids: Tensor | None  # (N,) int64: text
    label_rows: Tensor  # (N,) int64
    token_word: Tensor | None  # (R, T) int64, -1 where there is none: tagging
    gold: bool  # the step's sources are gold text, not back-translations
    sample_ids: tuple[str, ...]  # (n,), or (R,) if not paired
    units: tuple[Any, ...] = ()  # MicroBatch's contrast sets; none here

    def to(self, device: torch.device) -> TaskBatch:
        """The same micro-batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            spec.name: value.to(device, non_blocking=True)
            for spec in fields(self)
            if isinstance(value := getattr(self, spec.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Row:
    """One text of a micro-batch, and what is learned from it."""

    side: EncodedSide
    labels: SideLabels
    language: int
    target_language: int
    weight: float
    is_source: bool

    @property
    def n_units(self) -> int:
        if self.labels.positions is not None:
            return len(self.labels.positions)
        return 1 if self.labels.classes is None else len(self.labels.classes)


class TaskPacker:
    """Packs samples into padded micro-batches; a pure function of the samples and the budget.

    Args:
        pad_id: token id of padding.
        micro_batch_tokens: rows x row length of a micro-batch stays within this; a sample or pair above it runs alone.
        task: the kind of labels, and how words are pooled.
        paired: whether each sample brings its source along.
        has_token_types: whether the tokenizer tells the first text of a pair from the second.
    """

    layout: Literal["padded"] = "padded"

    def __init__(
        self, pad_id: int, micro_batch_tokens: int, task: TaskConfig, paired: bool, has_token_types: bool
    ) -> None:
        self.pad_id = pad_id
        self.micro_batch_tokens = micro_batch_tokens
        self.task = task
        self.paired = paired
        self.has_token_types = has_token_types

    def pack(self, samples: Sequence[TaskSample], *, gold: bool = True) -> list[TaskBatch]:
        """Longest first, as many as fit; `gold` is the step's choice of sources."""
        batches: list[list[TaskSample]] = []
        for sample in sorted(samples, key=lambda sample: -self._length(sample)):
            row = self._length(batches[-1][0]) if batches else 0
            if batches and (len(batches[-1]) + 1) * self._sides * row <= self.micro_batch_tokens:
                batches[-1].append(sample)
                continue
            if self._sides * self._length(sample) > self.micro_batch_tokens:
                log.warning(
                    "%s: %d tokens are above micro_batch_tokens (%d); it runs alone",
                    sample.id, self._sides * self._length(sample), self.micro_batch_tokens,
                )  # fmt: skip
            batches.append([sample])
        return [self._collate(batch, gold) for batch in batches]

    def idle(self, *, gold: bool = True) -> TaskBatch:
        """One token a row, no label: keeps a rank in step when others have more micro-batches."""
        return self._collate([], gold)

    @property
    def _sides(self) -> int:
        return 2 if self.paired else 1

    def _length(self, sample: TaskSample) -> int:
        return max(len(sample.target), len(sample.source) if sample.source is not None and self.paired else 0)

    def _collate(self, samples: Sequence[TaskSample], gold: bool) -> TaskBatch:
        rows = self._rows(samples) or [self._stand_in(is_source=number > 0) for number in range(self._sides)]
        shape = (len(rows), max(len(row.side) for row in rows))
        input_ids = np.full(shape, self.pad_id, np.int64)
        attention_mask, token_type_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            here = (number, slice(len(row.side)))
            input_ids[here], attention_mask[here], token_type_ids[here] = row.side.input_ids, 1, row.side.token_type_ids
        units = [row.n_units for row in rows]

        def of_units(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(np.repeat(values, units), dtype=dtype)

        return TaskBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            token_type_ids=torch.from_numpy(token_type_ids) if self.has_token_types else None,
            n_pairs=len(rows) // 2 if self.paired else 0,
            row_languages=torch.tensor([row.language for row in rows], dtype=torch.int64),
            label_weights=of_units([row.weight for row in rows], torch.float32),
            label_languages=of_units([row.target_language for row in rows], torch.int64),
            label_is_source=of_units([row.is_source for row in rows], torch.bool),
            label_rows=of_units(list(range(len(rows))), torch.int64),
            **self._labels(rows, shape),
            gold=gold,
            sample_ids=tuple(sample.id for sample in samples),
        )

    def _rows(self, samples: Sequence[TaskSample]) -> list[_Row]:
        rows = [_Row(s.target, s.target_labels, s.language, s.language, 1.0, False) for s in samples]
        if self.paired:
            for sample in samples:
                if sample.source is None or sample.source_labels is None:
                    raise ValueError(f"{sample.id} has no source, and samples are paired")
                weight = float(sample.source_counts)
                rows.append(
                    _Row(sample.source, sample.source_labels, sample.source_language, sample.language, weight, True)
                )
        return rows

    def _stand_in(self, is_source: bool) -> _Row:
        one = np.zeros(1, np.int32)
        labels = SideLabels()
        if self.task.labels:
            labels = SideLabels(classes=np.zeros((1, len(self.task.labels)), np.float32))
        elif self.task.kind == "text":
            labels = SideLabels(positions=one, ids=one)
        side = EncodedSide(one + self.pad_id, one.astype(np.int8), one, one.astype(np.bool_), (0, 1), NO_ANSWER)
        return _Row(side, labels, 0, 0, 0.0, is_source)

    def _labels(self, rows: Sequence[_Row], shape: tuple[int, int]) -> dict[str, Any]:
        """The fields of TaskBatch that depend on the kind of labels."""
        kind = self.task.kind
        found: dict[str, Any] = dict.fromkeys(
            ("label_classes", "label_spans", "label_positions", "label_ids", "token_word")
        )
        if kind in ("classification", "tagging"):
            found["label_classes"] = torch.from_numpy(np.concatenate([row.labels.classes for row in rows]))
        if kind == "tagging":
            found["token_word"] = torch.from_numpy(self._token_word(rows, shape))
        elif kind == "qa":
            found["label_spans"] = torch.tensor([row.side.span or NO_ANSWER for row in rows], dtype=torch.int64)
        elif kind == "text":
            positions = np.concatenate([row.labels.positions for row in rows]).astype(np.int64)
            row_starts = np.repeat(np.arange(len(rows)) * shape[1], [row.n_units for row in rows])
            found["label_positions"] = torch.from_numpy(positions + row_starts)
            found["label_ids"] = torch.from_numpy(np.concatenate([row.labels.ids for row in rows]).astype(np.int64))
        return found

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
