"""Collates tokenised conversations into a micro-batch of a decoder.

Shapes: B rows, T tokens per row, S samples (segments), N label positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batching.batch import (
    Batch,
    BatchShape,
    ChatBatch,
    ChatTargets,
    ContrastSets,
    TokenTargets,
)
from data_pipeline.batching.grid import Layout
from data_pipeline.batching.packer import Collator
from data_pipeline.records import NO_LANGUAGE, ChatSample, Sample

PADDING = -1


class ChatCollator(Collator):
    """Concatenates the samples of a row (packed layout), or pads rows of one sample each (padded layout)."""

    counts: ClassVar[tuple[str, ...]] = ("label_tokens",)

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def collate(self, rows: Sequence[Sequence[Sample]], layout: Layout, contrast: ContrastSets | None) -> ChatBatch:
        order = [sample for row in rows for sample in row if isinstance(sample, ChatSample)]  # made by ChatStage
        length = max((sum(map(len, row)) for row in rows), default=1)
        grid = _Grid(max(len(rows), 1), length, self.pad_id)
        segment = 0
        for row_index, row in enumerate(rows):
            start = 0
            for sample in row:
                assert isinstance(sample, ChatSample)  # made by ChatStage
                grid.put(row_index, start, segment, sample)
                start += len(sample)
                segment += 1
        return grid.batch(order, contrast, with_mask=layout == "padded")

    def blank(self, shape: BatchShape) -> ChatBatch:
        ids_BT = torch.zeros(shape.rows, shape.row_tokens, dtype=torch.int64)
        labels_N = torch.zeros(max(shape.labels, 1), dtype=torch.int64)
        targets = ChatTargets(
            TokenTargets(labels_N, labels_N), segment_ids=ids_BT, n_segments=max(shape.segments, 1), languages=ids_BT,
            vector_languages=ids_BT, content=ids_BT.bool(), contrast=_blank_sets(shape.pairs),
            segment_languages=torch.zeros(max(shape.segments, 1), dtype=torch.int64),
            segment_parallel=torch.zeros(max(shape.segments, 1), dtype=torch.bool),
        )  # fmt: skip
        return Batch(
            input_ids=ids_BT, attention_mask=None, position_ids=ids_BT, label_weights=labels_N.float(),
            label_languages=labels_N, targets=targets, samples=(),
        )  # fmt: skip


def _blank_sets(n_pairs: int) -> ContrastSets | None:
    """One set of that many pairs, all on this rank."""
    if not n_pairs:
        return None
    members = torch.zeros(2 * n_pairs, dtype=torch.int64)
    pairs = torch.zeros(1, n_pairs, 2, dtype=torch.int64)
    excluded = torch.zeros(1, n_pairs, n_pairs, dtype=torch.bool)
    return ContrastSets(members, members[:0], (0,), (0,), pairs, excluded, torch.ones(1, dtype=torch.bool))


class _Grid:
    """The (B, T) arrays of one micro-batch while they are filled."""

    def __init__(self, n_rows: int, length: int, pad_id: int) -> None:
        shape = (n_rows, length)
        self.length = length
        self.input_ids = np.full(shape, pad_id, dtype=np.int64)
        self.position_ids = np.zeros(shape, dtype=np.int64)
        self.segment_ids = np.full(shape, PADDING, dtype=np.int64)
        self.languages = np.full(shape, NO_LANGUAGE, dtype=np.int64)
        self.vector_languages = np.full(shape, NO_LANGUAGE, dtype=np.int64)
        self.content = np.zeros(shape, dtype=np.bool_)
        self.filled = np.zeros(n_rows, dtype=np.int64)
        self.labels: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]] = []

    def put(self, row: int, start: int, segment: int, sample: ChatSample) -> None:
        stop = start + len(sample)
        here = (row, slice(start, stop))
        self.input_ids[here] = sample.input_ids
        self.position_ids[here] = np.arange(len(sample))
        self.segment_ids[here] = segment
        self.languages[here] = np.where(sample.labels | sample.answer, sample.response_language, sample.language)
        same = sample.response_language == sample.language
        counted = sample.content | sample.answer if same else sample.content
        if not sample.parallel:
            self.vector_languages[here] = np.where(counted, sample.language, NO_LANGUAGE)
        self.content[here] = sample.content
        self.filled[row] = stop
        targets = np.flatnonzero(sample.labels)
        targets = targets[targets > 0]  # no position predicts the first token
        if len(targets):
            positions = row * self.length + start + targets - 1
            self.labels.append((positions, sample.input_ids[targets], sample.language))

    def batch(self, order: Sequence[ChatSample], contrast: ContrastSets | None, with_mask: bool) -> ChatBatch:
        padding = self.segment_ids == PADDING
        # Padding is treated as another sample at the end of the row: positions restart, so no real token attends to it.
        ramp = np.arange(self.length)[None, :] - self.filled[:, None]
        self.position_ids[padding] = ramp[padding]
        mask = (~padding).astype(np.int64)
        if not self.filled.any():
            mask[:, 0] = 1  # in an idle micro-batch, the only token attends to itself
        # without labels, one placeholder of weight 0
        labels = self.labels or [(np.zeros(1, np.int64), np.zeros(1, np.int32), 0)]
        positions = np.concatenate([places for places, _, _ in labels])
        ids = np.concatenate([predicted for _, predicted, _ in labels]).astype(np.int64)
        label_languages = np.concatenate([np.full(len(places), language, np.int64) for places, _, language in labels])
        segment_languages = [sample.language if sample.content.any() else NO_LANGUAGE for sample in order]
        targets = ChatTargets(
            tokens=TokenTargets(torch.from_numpy(positions), torch.from_numpy(ids)),
            segment_ids=torch.from_numpy(self.segment_ids),
            n_segments=max(len(order), 1),
            languages=torch.from_numpy(self.languages),
            vector_languages=torch.from_numpy(self.vector_languages),
            content=torch.from_numpy(self.content),
            segment_languages=torch.tensor(segment_languages or [NO_LANGUAGE]),
            segment_parallel=torch.tensor([sample.parallel for sample in order] or [False]),
            contrast=contrast,
        )
        return Batch(
            input_ids=torch.from_numpy(self.input_ids),
            attention_mask=torch.from_numpy(mask) if with_mask else None,
            position_ids=torch.from_numpy(self.position_ids),
            label_weights=torch.full((len(positions),), 1.0 if self.labels else 0.0),
            label_languages=torch.from_numpy(label_languages),
            targets=targets,
            samples=tuple(order),
        )
