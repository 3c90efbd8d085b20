"""The `data.task` section of a run file.

No large library is imported here, so that a run file is read quickly.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.config import TaskKind
from data_pipeline.settings import Section

WINDOWED: tuple[TaskKind, ...] = ("tagging", "qa", "text")  # kinds whose long texts are split into windows
# Options that apply to some kinds only.
KINDS_OF_OPTION: dict[str, tuple[TaskKind, ...]] = {
    "doc_stride": ("qa", "tagging"),
    "max_question_length": ("qa",),
    "word_pooling": ("tagging",),
    "mask_probability": ("text",),
}


class TaskConfig(Section):
    """The task that an encoder is trained on; texts are cut to `data.sequence_length` tokens."""

    kind: TaskKind = Field(description="kind of the rows; it must match the sources' columns")
    labels: tuple[str, ...] = Field(
        (), description="classification and tagging: every label, in the order of the model's outputs"
    )
    doc_stride: int = Field(
        128, gt=0, description="tokens from the start of one window to the start of the next, in texts of several"
    )
    max_question_length: int = Field(64, gt=0, description="most tokens of a question; longer ones are truncated")
    word_pooling: Literal["mean", "first"] = Field(
        "mean", description="tagging: a word's logits are the mean over its tokens, or those of its first token"
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="share of a text's tokens that are predicted")

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        labelled = self.kind in ("classification", "tagging")
        if labelled and len(self.labels) < 2:
            raise ValueError(f"kind {self.kind!r} needs 'labels', at least two")
        if not labelled and self.labels:
            raise ValueError(f"'labels' goes with kind 'classification' and 'tagging', not with {self.kind!r}")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("'labels' names a label twice")
        for option, kinds in KINDS_OF_OPTION.items():
            default = type(self).model_fields[option].default
            if self.kind not in kinds and getattr(self, option) != default:
                raise ValueError(f"{option!r} goes with kind {' and '.join(map(repr, kinds))}, not with {self.kind!r}")
        return self
