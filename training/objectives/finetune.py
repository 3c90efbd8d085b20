"""Fine-tuning of encoders on a task, for zero-shot transfer and translate-train.

Shapes: R rows (texts), N label units (rows, words or tokens).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_pipeline.config import RowKind
from training.objectives.base import LossTerm, LossTerms, Objective, ObjectiveConfig, ObjectiveParts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import TaskBatch
    from training.engine.engine import Engine


class FineTuneConfig(ObjectiveConfig):
    """A task's loss on its own samples: English only (zero-shot transfer), or with translations (translate-train)."""

    name: Literal["finetune"]

    kinds: ClassVar[tuple[RowKind, ...]] = ("classification", "tagging", "qa")
    terms: ClassVar[tuple[str, ...]] = ("task",)

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> TaskFineTuning:
        return TaskFineTuning()


class TaskFineTuning(Objective):
    """The mean loss of the label units of a task."""

    def loss_terms(self, engine: Engine, batch: TaskBatch) -> LossTerms:
        losses = self._unit_losses(engine, batch)
        task = LossTerm(losses.sum(), denominator="target_labels", weight=1.0)
        return LossTerms(losses, batch.label_weights, batch.label_languages, {"task": task})

    def saved_loss(self, engine: Engine, batch: TaskBatch) -> Tensor:
        outputs = engine.forward(**batch.model_inputs())
        loss: Tensor = outputs[0].float().sum()
        return loss

    def _unit_losses(self, engine: Engine, batch: TaskBatch) -> Tensor:
        """(N,) fp32."""
        return unit_losses(engine.forward(**batch.model_inputs()), batch)


def unit_losses(outputs: Any, batch: TaskBatch) -> Tensor:
    """(N,) fp32 loss of each label unit of a task model's outputs, 0 at placeholders."""
    from data_pipeline.batching.batch import ClassTargets, SpanTargets, TagTargets
    from modeling.tasks.task_losses import classification_losses, span_losses, tagging_losses

    rows = batch.targets.label_rows
    match batch.targets.labels:
        case ClassTargets(classes):
            losses = classification_losses(outputs.logits, classes, rows)
        case TagTargets(classes, token_word):
            losses = tagging_losses(outputs.logits, classes, token_word)
        case SpanTargets(spans):
            losses = span_losses(outputs.start_logits, outputs.end_logits, batch.padding_mask, spans, rows)
        case labels:
            raise TypeError(f"{type(labels).__name__}: not the labels of a task with its own head")
    return losses * batch.label_weights
