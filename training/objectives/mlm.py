"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1): pre-training of encoders on raw text.

Shapes: N masked positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from data_pipeline.config import RowKind
from training.objectives.base import ObjectiveConfig, ObjectiveParts
from training.objectives.finetune import TaskFineTuning
from training.objectives.sft import token_target_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import TaskBatch
    from training.engine.engine import Engine


class MaskedLMConfig(ObjectiveConfig):
    """Masked language modelling: pre-training of encoders on raw text."""

    name: Literal["mlm"]

    kinds: ClassVar[tuple[RowKind, ...]] = ("text",)
    terms: ClassVar[tuple[str, ...]] = ("task",)

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> MaskedLM:
        return MaskedLM(model)


class MaskedLM(TaskFineTuning):
    """Cross-entropy on masked tokens; the LM head's matrix is applied at these positions only."""

    def __init__(self, model: PreTrainedModel) -> None:
        from modeling.label_head import LabelHead

        self.head = LabelHead(model)

    def saved_loss(self, engine: Engine, batch: TaskBatch) -> Tensor:
        return self._unit_losses(engine, batch).sum()

    def _unit_losses(self, engine: Engine, batch: TaskBatch) -> Tensor:
        from data_pipeline.batching.batch import TokenTargets

        tokens = batch.targets.labels
        assert isinstance(tokens, TokenTargets)  # of kind text
        return token_target_losses(engine, self.head, batch, tokens)
