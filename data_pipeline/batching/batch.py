"""Batch: what one forward pass reads. A common core, and the targets of its kind of rows.

Shapes: B rows, T tokens a row, S samples (segments), N label units, P translation pairs, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from data_pipeline.records import Sample

Moved = TypeVar("Moved")


class SupportsCounts(Protocol):
    """Targets of a kind of rows."""

    def counts(self, label_weights: Tensor) -> dict[str, float]:
        """A batch's part of the step's counts by name: the denominators of loss terms."""
        ...


Targets = TypeVar("Targets", bound=SupportsCounts)


@dataclass(frozen=True, slots=True)
class SampleUnit:
    """Samples that stay in one micro-batch: a unit of the plan after reading, with its pairs as indices into them."""

    samples: tuple[Sample, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows that its samples take."""
        return sum(sample.row_length for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Batch(Generic[Targets]):
    """One micro-batch.

    A label unit is a token to be predicted (conversations, masked words), a text (classification, question answering)
    or a word (tagging). A micro-batch without labels holds one stand-in of weight 0, so that every rank runs the same
    graph.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64; None in the packed layout
    label_weights: Tensor  # (N,) float32: 1, or 0 where a label is not learned from
    label_languages: Tensor  # (N,) int64: the sample's language
    targets: Targets
    units: tuple[SampleUnit, ...]  # what it holds, in the order it was placed
    sample_ids: tuple[str, ...]  # in the order of segments or rows
    position_ids: Tensor | None = None  # (B, T) int64, where positions restart at each sample
    token_type_ids: Tensor | None = None  # (B, T) int64, where the tokenizer has them

    @property
    def samples(self) -> list[Sample]:
        """All its samples, in the order they were placed."""
        return [sample for unit in self.units for sample in unit.samples]

    @property
    def padding_mask(self) -> Tensor:
        """The attention mask (B, T) of the padded layout."""
        assert self.attention_mask is not None
        return self.attention_mask

    def counts(self) -> dict[str, float]:
        """Its part of the step's counts by name."""
        return self.targets.counts(self.label_weights)

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass. Packed rows need all three of: no mask, positions that restart, no cache."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.position_ids is not None:
            inputs |= {"position_ids": self.position_ids, "use_cache": False}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs

    def to(self, device: torch.device) -> Batch[Targets]:
        """The same micro-batch with every tensor on `device`."""
        return replace(_moved(self, device), targets=_moved(self.targets, device))


def _moved(value: Moved, device: torch.device) -> Moved:
    """A dataclass with its tensors, and those of dataclasses in it, on `device`."""
    changes: dict[str, Any] = {}
    for spec in fields(value):  # type: ignore[arg-type]
        inner = getattr(value, spec.name)
        if isinstance(inner, Tensor):
            changes[spec.name] = inner.to(device, non_blocking=True)
        elif is_dataclass(inner):
            changes[spec.name] = _moved(inner, device)
    return replace(value, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes of a micro-batch without its content."""

    rows: int  # where samples come with a partner: both texts' rows
    row_tokens: int
    labels: int  # positions that meet the LM head
    segments: int  # samples
    pairs: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """Tokens to be predicted. `positions` index the flattened (B*T) states whose output predicts `ids`."""

    positions: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64


@dataclass(frozen=True, slots=True)
class ContrastPairs:
    """Translation pairs of a micro-batch, in contrast sets."""

    segments: Tensor  # (P, 2) int64: (dominant, other)
    sets: Tensor  # (P,) int64: contrast set within the micro-batch
    groups: Tensor  # (P,) int64: item
    contents: Tensor  # (P, 2) int64: hashes of the two texts


@dataclass(frozen=True, slots=True)
class ChatTargets:
    """What is learned from conversations.

    `languages` is each token's language (prompt tokens: the question's; answer tokens: the answer's), -1 on
    padding. `vector_languages` is the same for tokens that count towards language vectors, else -1: the user's
    content, and the answer where it is in the sample's own language (docs/methods.md, section 1.1).
    """

    tokens: TokenTargets
    segment_ids: Tensor  # (B, T) int64, -1 on padding
    n_segments: int  # S, at least 1
    languages: Tensor  # (B, T) int64
    vector_languages: Tensor  # (B, T) int64
    content: Tensor  # (B, T) bool
    pairs: ContrastPairs

    def counts(self, label_weights: Tensor) -> dict[str, float]:
        return {"label_tokens": float(label_weights.sum()), "pairs": float(len(self.pairs.segments))}


@dataclass(frozen=True, slots=True)
class ClassTargets:
    """Classification: a class a text."""

    classes: Tensor  # (N, C) float32 probabilities


@dataclass(frozen=True, slots=True)
class TagTargets:
    """Tagging: a class a word."""

    classes: Tensor  # (N, C) float32 probabilities
    token_word: Tensor  # (B, T) int64: the label unit that a token belongs to, -1 where there is none


@dataclass(frozen=True, slots=True)
class SpanTargets:
    """Question answering: first and last token of the answer."""

    spans: Tensor  # (N, 2) int64


TaskLabels = ClassTargets | TagTargets | SpanTargets | TokenTargets


@dataclass(frozen=True, slots=True)
class TaskTargets:
    """What is learned from the rows of a task; with partners, rows [0, n) are targets and [n, 2n) their sources."""

    labels: TaskLabels
    n_pairs: int  # n; 0: no partners
    row_languages: Tensor  # (B,) int64
    label_is_source: Tensor  # (N,) bool
    label_rows: Tensor  # (N,) int64
    gold: bool  # the step's sources are gold text, not back-translations

    def counts(self, label_weights: Tensor) -> dict[str, float]:
        of_sources = float(label_weights[self.label_is_source].sum())
        return {
            "target_labels": float(label_weights.sum()) - of_sources,
            "source_labels": of_sources,
            "pairs": float(self.n_pairs) if label_weights.any() else 0.0,  # those of an idle micro-batch count for none
        }


ChatBatch = Batch[ChatTargets]
TaskBatch = Batch[TaskTargets]


def summed(counts: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Counts of several micro-batches added up; zeros for `names` where there are none."""
    return {name: sum((each[name] for each in counts), 0.0) for name in names}
