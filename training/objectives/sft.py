"""Supervised fine-tuning of decoders: cross-entropy on answer tokens. On several languages it is MSFT, the baseline.

Shapes: N label positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_pipeline.config import RowKind
from training.objectives.base import LossTerm, LossTerms, Objective, ObjectiveConfig, ObjectiveParts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import Batch, ChatBatch, TokenTargets
    from modeling.label_head import LabelHead
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
        from modeling.label_head import LabelHead

        self.head = LabelHead(model)

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        losses = self._token_losses(engine, batch)
        sft = LossTerm(losses.sum(), denominator="label_tokens", weight=self.sft_weight)
        return LossTerms(losses, batch.label_weights, batch.label_languages, {"sft": sft})

    def _token_losses(self, engine: Engine, batch: ChatBatch) -> Tensor:
        """(N,) fp32."""
        return token_target_losses(engine, self.head, batch, batch.targets.tokens)


def token_target_losses(engine: Engine, head: LabelHead, batch: Batch[Any], tokens: TokenTargets) -> Tensor:
    """(N,) fp32 losses of tokens to be predicted, 0 at placeholders; the LM head reads their positions alone."""
    from modeling.label_head import token_losses

    with head.select(tokens.positions):
        logits_1NV = engine.forward(**batch.model_inputs()).logits
    return token_losses(logits_1NV[0], tokens.ids) * batch.label_weights
