"""Samples of one rank and step -> micro-batches within a token budget.

In: the units (single slots, or contrast sets, which stay whole) that `plan.assign` gave this rank, tokenised.
Out: MicroBatches of tensors in one of two layouts. Next: `loader.py`, then `training.loop.trainer`.

- `packed`: rows of at most `row_tokens`, several samples a row, position ids restart at each sample, no
  attention mask: attention is block-diagonal by position ids (or varlen, where rows are one).
- `padded`: one sample a row, right-padded, with an attention mask; right for every model.

Shapes: B rows, T tokens a row, S samples (segments), N label positions, P translation pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.records import NO_LANGUAGE, TokenizedSample

log = logging.getLogger(__name__)
Layout = Literal["packed", "padded"]
PADDING = -1
_Sample = TypeVar("_Sample", bound=Sized)


@dataclass(frozen=True, slots=True)
class TokenizedUnit:
    """A unit of the plan after reading: its samples, and its pairs as indices into them."""

    samples: tuple[TokenizedSample, ...]
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass reads.

    `languages` is each token's language (prompt tokens: the question's; answer tokens: the answer's), -1 on
    padding. `vector_languages` is the same for tokens that count towards language vectors, else -1: the user's
    content, and the answer where it is in the sample's own language (docs/methods.md, section 1.1).
    `label_positions` index the flattened (B*T) states whose output predicts `label_ids`; a micro-batch without
    any label holds one position of weight 0, so that every rank runs the same graph.
    """

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64, padded layout only
    segment_ids: Tensor  # (B, T) int64, -1 on padding
    languages: Tensor  # (B, T) int64
    vector_languages: Tensor  # (B, T) int64
    content: Tensor  # (B, T) bool
    label_positions: Tensor  # (N,) int64
    label_ids: Tensor  # (N,) int64
    label_weights: Tensor  # (N,) float32: 1, or 0 for the stand-in
    label_languages: Tensor  # (N,) int64: the sample's (question's) language
    pairs: Tensor  # (P, 2) int64: segments (dominant, other)
    pair_sets: Tensor  # (P,) int64: contrast set within the micro-batch
    pair_groups: Tensor  # (P,) int64
    pair_contents: Tensor  # (P, 2) int64
    units: tuple[TokenizedUnit, ...]  # what was packed, in the order it was placed
    sample_ids: tuple[str, ...]  # (S,)
    n_segments: int  # S, at least 1

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            spec.name: value.to(device, non_blocking=True)
            for spec in fields(self)
            if isinstance(value := getattr(self, spec.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(slots=True)
class _Bin:
    """One micro-batch being filled: rows of samples."""

    rows: list[list[TokenizedSample]] = field(default_factory=list)
    units: list[TokenizedUnit] = field(default_factory=list)


class Packer:
    """Packs units into micro-batches; a pure function of the units and the budget.

    Args:
        layout: "packed" or "padded".
        micro_batch_tokens: rows x row length of a micro-batch stays within this.
        row_tokens: longest row of the packed layout (varlen attention: the whole micro-batch in one row).
        pad_id: token id of padding.
    """

    def __init__(self, layout: Layout, micro_batch_tokens: int, row_tokens: int, pad_id: int) -> None:
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens
        self.row_tokens = min(row_tokens, micro_batch_tokens)
        self.pad_id = pad_id

    def pack(self, units: Sequence[TokenizedUnit]) -> list[MicroBatch]:
        """First-fit decreasing over units; a contrast set above the budget gets a micro-batch of its own."""
        bins: list[_Bin] = []
        for unit in sorted(units, key=lambda unit: -sum(map(len, unit.samples))):
            if not unit.samples:
                continue
            for candidate in bins:
                rows = self._place(candidate.rows, unit.samples, self.micro_batch_tokens)
                if rows is not None:
                    break
            else:
                candidate = _Bin()
                bins.append(candidate)
                rows = self._place([], unit.samples, self.micro_batch_tokens)
                if rows is None:
                    needed = self.tokens_alone([len(sample) for sample in unit.samples])
                    if needed > self.micro_batch_tokens:
                        log.warning(
                            "a contrast set takes %d tokens %s, above micro_batch_tokens (%d); it runs alone",
                            needed, self.layout, self.micro_batch_tokens,
                        )  # fmt: skip
                    rows = self._place([], unit.samples, None)
            assert rows is not None
            candidate.rows = rows
            candidate.units.append(unit)
        return [self._collate(each) for each in bins]

    def idle(self) -> MicroBatch:
        """One token, no label, no language: keeps a rank in step when others have more micro-batches."""
        return self._collate(_Bin())

    def tokens_alone(self, lengths: Sequence[int]) -> int:
        """Rows x longest row of a micro-batch that holds samples of these lengths and no others."""
        rows = self._place([], [range(length) for length in lengths], None)
        assert rows is not None
        return len(rows) * max(sum(map(len, row)) for row in rows)

    def _place(
        self, rows: list[list[_Sample]], samples: Sequence[_Sample], budget: int | None
    ) -> list[list[_Sample]] | None:
        """Rows with `samples` added, or None where the budget does not hold them; only their lengths count."""
        placed = [list(row) for row in rows]
        if self.layout == "padded":
            placed += [[sample] for sample in samples]
            longest = max(len(row[0]) for row in placed)
            return placed if budget is None or longest * len(placed) <= budget else None
        room = [self.row_tokens - sum(map(len, row)) for row in placed]
        for sample in sorted(samples, key=len, reverse=True):
            fitting = [index for index, free in enumerate(room) if free >= len(sample)]
            if fitting:
                best = min(fitting, key=lambda index: room[index])
                placed[best].append(sample)
                room[best] -= len(sample)
            elif budget is None or (len(placed) + 1) * self.row_tokens <= budget or not placed:
                placed.append([sample])
                room.append(self.row_tokens - len(sample))
            else:
                return None
        return placed

    def _collate(self, packed: _Bin) -> MicroBatch:
        rows = packed.rows
        order = [sample for row in rows for sample in row]
        length = max((sum(map(len, row)) for row in rows), default=1)
        grid = _Grid(max(len(rows), 1), length, self.pad_id)
        segment = 0
        for row_index, row in enumerate(rows):
            start = 0
            for sample in row:
                grid.put(row_index, start, segment, sample)
                start += len(sample)
                segment += 1
        return MicroBatch(
            **grid.tensors(with_mask=self.layout == "padded"),
            **_pair_tensors(packed.units, order),
            units=tuple(packed.units),
            sample_ids=tuple(sample.id for sample in order),
            n_segments=max(len(order), 1),
        )


class _Grid:
    """(B, T) arrays of one micro-batch being filled."""

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

    def put(self, row: int, start: int, segment: int, sample: TokenizedSample) -> None:
        stop = start + len(sample)
        here = (row, slice(start, stop))
        self.input_ids[here] = sample.input_ids
        self.position_ids[here] = np.arange(len(sample))
        self.segment_ids[here] = segment
        self.languages[here] = np.where(sample.labels | sample.answer, sample.response_language, sample.language)
        same = sample.response_language == sample.language
        counted = sample.content | sample.answer if same else sample.content
        self.vector_languages[here] = np.where(counted, sample.language, NO_LANGUAGE)
        self.content[here] = sample.content
        self.filled[row] = stop
        targets = np.flatnonzero(sample.labels)
        targets = targets[targets > 0]  # the first token has nothing before it that could predict it
        positions = row * self.length + start + targets - 1
        self.labels.append((positions, sample.input_ids[targets], sample.language))

    def tensors(self, with_mask: bool) -> dict[str, Any]:
        padding = self.segment_ids == PADDING
        # Padding is one more sample at the row's end: its positions restart, so no real token sees it.
        ramp = np.arange(self.length)[None, :] - self.filled[:, None]
        self.position_ids[padding] = ramp[padding]
        positions = [positions for positions, _, _ in self.labels if len(positions)]
        if positions:
            label_positions = np.concatenate(positions)
            label_ids = np.concatenate([ids for _, ids, _ in self.labels]).astype(np.int64)
            label_languages = np.concatenate(
                [np.full(len(ids), language, dtype=np.int64) for _, ids, language in self.labels]
            )
            label_weights = np.ones(len(label_ids), dtype=np.float32)
        else:
            label_positions = label_ids = label_languages = np.zeros(1, dtype=np.int64)
            label_weights = np.zeros(1, dtype=np.float32)
        arrays = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "segment_ids": self.segment_ids,
            "languages": self.languages,
            "vector_languages": self.vector_languages,
            "content": self.content,
            "label_positions": label_positions,
            "label_ids": label_ids,
            "label_languages": label_languages,
            "label_weights": label_weights,
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        mask = (~padding).astype(np.int64)
        if not self.filled.any():
            mask[:, 0] = 1  # an idle micro-batch: its one token sees itself
        tensors["attention_mask"] = torch.from_numpy(mask) if with_mask else None
        return tensors


def _pair_tensors(units: Sequence[TokenizedUnit], order: Sequence[TokenizedSample]) -> dict[str, Tensor]:
    segment_of = {id(sample): segment for segment, sample in enumerate(order)}
    pairs, sets, groups, contents = [], [], [], []
    for set_number, unit in enumerate(units):
        for dominant, other in unit.pairs:
            first, second = unit.samples[dominant], unit.samples[other]
            pairs.append((segment_of[id(first)], segment_of[id(second)]))
            sets.append(set_number)
            groups.append(first.group)
            contents.append((first.content_hash, second.content_hash))
    return {
        "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        "pair_sets": torch.tensor(sets, dtype=torch.int64),
        "pair_groups": torch.tensor(groups, dtype=torch.int64),
        "pair_contents": torch.tensor(contents, dtype=torch.int64).reshape(-1, 2),
    }
