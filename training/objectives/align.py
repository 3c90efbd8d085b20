"""Alignment at one middle layer: fine-tuning plus a contrastive loss on translations, without a shift.

The method of Liu and Niehues 2025 (arXiv 2502.14830), in the forward pass of the fine-tuning loss. It is ShifCon's
contrastive loss with `shift: false` and an area of one layer (docs/methods.md, section 1.6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from training.objectives.base import ObjectiveParts
from training.objectives.contrast import ContrastiveFineTuning, ContrastiveObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AlignConfig(ContrastiveObjectiveConfig):
    """Fine-tuning, and a contrastive loss on translations at one layer (arXiv 2502.14830)."""

    name: Literal["align"]
    layer: int = Field(ge=0, description="translations are compared in the states that enter this layer")

    fixed_keys: ClassVar[tuple[str, ...]] = ("objective.layer", "data.languages", "data.dominant")

    def probe_size(self) -> int:
        return self.probe_items if self.normalises else 0

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        if self.layer > n_layers:
            yield f"objective.layer: {self.layer}, but the model has {n_layers} layers"

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> ContrastiveFineTuning:
        return ContrastiveFineTuning(model, self, [self.layer], parts)
