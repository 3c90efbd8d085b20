"""Supervised fine-tuning of decoders: cross-entropy on answer tokens. On several languages it is MSFT, the baseline.

Shapes: N label positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_pipeline.config import RowKind
from training.objectives.base import LossTerm, LossTerms, Objective, ObjectiveConfig, ObjectiveParts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import Batch, ChatBatch, TokenTargets
    from modeling.lm_head.label_head import LabelHead, LabelLosses
    from training.engine.engine import Engine


class SFTConfig(ObjectiveConfig):
    """Supervised fine-tuning: token-weighted cross-entropy on the answers (MSFT, the baseline)."""

    name: Literal["sft"]

    kinds: ClassVar[tuple[RowKind, ...]] = ("chat",)
    terms: ClassVar[tuple[str, ...]] = ("sft",)

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> SupervisedFineTuning:
        return SupervisedFineTuning(model)


class SupervisedFineTuning(Objective):
    """Cross-entropy on label tokens; the LM head computes logits at these positions only."""

    sft_weight = 1.0

    def __init__(self, model: PreTrainedModel) -> None:
        from modeling.lm_head.head_check import build_label_head

        self.head = build_label_head(model, "causal-lm")

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        losses = label_losses(engine, self.head, batch, batch.targets.tokens)
        sft = LossTerm(losses.sum, denominator="label_tokens", weight=self.sft_weight)
        return LossTerms(losses.each, batch.label_weights, batch.label_languages, {"sft": sft})

    def loss_memory(self, labels: int) -> tuple[int, int] | None:
        return self.head.loss_memory(labels)


def label_losses(engine: Engine, head: LabelHead, batch: Batch[Any], tokens: TokenTargets) -> LabelLosses:
    """Losses of tokens to be predicted, 0 at placeholders; the LM head reads their positions alone."""
    return head.losses(
        lambda: engine.forward(**batch.model_inputs()), tokens.positions, tokens.ids, batch.label_weights
    )
