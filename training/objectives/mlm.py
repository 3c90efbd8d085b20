"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1): pre-training of encoders on raw text.

Shapes: N masked positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from data_pipeline.config import RowKind
from training.objectives.base import LossTerm, LossTerms, Objective, ObjectiveConfig, ObjectiveParts
from training.objectives.sft import label_losses

if TYPE_CHECKING:
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


class MaskedLM(Objective):
    """Cross-entropy on masked tokens; the LM head's matrix is applied at these positions only."""

    def __init__(self, model: PreTrainedModel) -> None:
        from modeling.lm_head.head_check import build_label_head

        self.head = build_label_head(model, "masked-lm")

    def loss_terms(self, engine: Engine, batch: TaskBatch) -> LossTerms:
        from data_pipeline.batching.batch import TokenTargets

        tokens = batch.targets.labels
        assert isinstance(tokens, TokenTargets)  # of kind text
        losses = label_losses(engine, self.head, batch, tokens)
        task = LossTerm(losses.sum, denominator="target_labels", weight=1.0)
        return LossTerms(losses.each, batch.label_weights, batch.label_languages, {"task": task})

    def loss_memory(self, labels: int) -> tuple[int, int] | None:
        return self.head.loss_memory(labels)
