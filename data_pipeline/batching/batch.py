"""Batch: the tensors of one micro-batch, with the targets of its kind of rows.

Shapes: B rows, T tokens per row, S samples (segments), N label units. Contrast sets: W ranks, C sets, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from data_pipeline.records import Sample

Moved = TypeVar("Moved")


Targets = TypeVar("Targets", bound="ChatTargets | TaskTargets")


@dataclass(frozen=True, slots=True)
class Batch(Generic[Targets]):
    """One micro-batch.

    A label unit is a token to be predicted (conversations, masked words), a text (classification, question answering)
    or a word (tagging). A micro-batch without labels holds one placeholder of weight 0, so that every rank runs the
    same graph.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor | None  # (B, T) int64; None in the packed layout
    label_weights: Tensor  # (N,) float32: 1, or 0 for a label that does not contribute to the loss
    label_languages: Tensor  # (N,) int64: the sample's language
    targets: Targets  # the labels, specific to the kind of rows
    samples: tuple[Sample, ...]  # in the order of segments or rows
    position_ids: Tensor | None = None  # (B, T) int64, if positions restart at each sample
    token_type_ids: Tensor | None = None  # (B, T) int64, if the tokenizer has them

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """In the order of segments or rows."""
        return tuple(sample.id for sample in self.samples)

    @property
    def padding_mask(self) -> Tensor:
        """The attention mask (B, T) of the padded layout."""
        assert self.attention_mask is not None
        return self.attention_mask

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass. Packed rows require no mask, restarting positions and no cache."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.position_ids is not None:
            inputs |= {"position_ids": self.position_ids, "use_cache": False}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs

    def to(self, device: torch.device) -> Batch[Targets]:
        """The same micro-batch with every tensor on `device`."""
        return _moved(self, device)


def _moved(value: Moved, device: torch.device) -> Moved:
    """A copy of a dataclass with its tensors, and those of nested dataclasses, on `device`."""
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
    """The sizes of a micro-batch."""

    rows: int  # with partners: rows of both texts
    row_tokens: int
    labels: int  # positions for which the LM head computes logits
    segments: int  # samples
    pairs: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """Tokens to be predicted. `positions` are the indices of the flattened (B*T) states that predict `ids`."""

    positions: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64


@dataclass(frozen=True, slots=True)
class ContrastSets:
    """The contrast sets of a micro-step in which this rank has a sample, and the exchange of their states.

    Their samples ("members") lie on several ranks. A rank sends each of its members' states to the other ranks that
    have a sample in the same set, and receives theirs. Members are numbered: the rank's own first, then the received
    ones, by rank.
    """

    own: Tensor  # (M,) int64: segments of this rank's members
    sent: Tensor  # (sum of sent_to,) int64: the own members to send, rank after rank
    sent_to: tuple[int, ...]  # (W,) how many to each rank; 0 to itself
    received_from: tuple[int, ...]  # (W,) how many from each rank
    pairs: Tensor  # (C, P, 2) int64: members (dominant, other); padded to the largest set by pairs (0, 0)
    excluded: Tensor  # (C, P, P) bool: combinations that are no negatives; for padding all but the pair itself
    is_reported: Tensor  # (C,) bool: whether this rank reports the set's loss; one rank does


@dataclass(frozen=True, slots=True)
class ChatTargets:
    """Targets of conversations."""

    tokens: TokenTargets
    segment_ids: Tensor  # (B, T) int64, -1 on padding
    n_segments: int  # S, at least 1
    languages: Tensor  # (B, T) int64: each token's language (the prompt's or the answer's), -1 on padding
    # (B, T) int64: the same for tokens that count towards language vectors, else -1. These are user content, and the
    # answer if it is in the sample's language (docs/methods.md, section 1.1); none of the parallel corpus.
    vector_languages: Tensor
    content: Tensor  # (B, T) bool: tokens of user content
    segment_languages: Tensor  # (S,) int64: each sample's language; -1 for one without content
    segment_parallel: Tensor  # (S,) bool: the sample is a text of the parallel corpus
    contrast: ContrastSets | None  # None: the micro-step has no sets, on any rank


@dataclass(frozen=True, slots=True)
class ClassTargets:
    """Classification: one class per text."""

    classes: Tensor  # (N, classes) float32 probabilities


@dataclass(frozen=True, slots=True)
class TagTargets:
    """Tagging: one class per word."""

    classes: Tensor  # (N, classes) float32 probabilities
    token_word: Tensor  # (B, T) int64: the label unit that a token belongs to, -1 if none


@dataclass(frozen=True, slots=True)
class SpanTargets:
    """Question answering: first and last token of the answer."""

    spans: Tensor  # (N, 2) int64


TaskLabels = ClassTargets | TagTargets | SpanTargets | TokenTargets


@dataclass(frozen=True, slots=True)
class TaskTargets:
    """Targets of the rows of a task. With partners, rows [0, n) are targets and rows [n, 2n) are their sources."""

    labels: TaskLabels
    n_pairs: int  # n; 0 without partners
    label_is_source: Tensor  # (N,) bool; the units of sources follow those of targets
    n_target_labels: int  # known here, since to count them on a device would wait for it
    label_rows: Tensor  # (N,) int64
    gold: bool  # the step prefers gold sources to back-translations


ChatBatch = Batch[ChatTargets]
TaskBatch = Batch[TaskTargets]
