"""Cosine alignment: fine-tuning plus the cosine distance of the mean states of translations at one layer.

`test_new_objective.py` adds this file to a copy of the source, as its only change beside a line in the registry.

Shapes: C contrast sets of P pairs, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from data_pipeline.config import RowKind
from data_pipeline.order.pairing import PairingRule
from training.objectives.base import LossTerm, LossTerms, ObjectiveConfig, ObjectiveParts
from training.objectives.sft import SupervisedFineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import ChatBatch
    from training.engine.engine import Engine


class CosineConfig(ObjectiveConfig):
    """Fine-tuning, plus the cosine distance of translations at one layer."""

    name: Literal["cosine"]
    layer: int = Field(ge=0, description="translations are compared in the states that enter this layer")
    weight: float = Field(ge=0, description="of the mean cosine distance")

    kinds: ClassVar[tuple[RowKind, ...]] = ("chat",)
    terms: ClassVar[tuple[str, ...]] = ("sft", "distance")

    def pairing(self) -> PairingRule:
        return PairingRule(set_size=1, needed=True)

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        if self.layer >= n_layers:
            yield f"objective.layer: {self.layer}, but the model has layers 0 to {n_layers - 1}"

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> Cosine:
        return Cosine(model, self)


class Cosine(SupervisedFineTuning):
    """The distance is summed over the pairs of which a side is on this rank, and divided by the step's pairs."""

    def __init__(self, model: PreTrainedModel, config: CosineConfig) -> None:
        from modeling.shifcon.contrastive import ContentPooling

        super().__init__(model)
        self.weight = config.weight
        self.pooling = ContentPooling(model, [config.layer])

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        from torch.nn import functional as F

        from training.objectives.members import gather_members

        targets = batch.targets
        with self.pooling.batch(targets.segment_ids, targets.content, targets.n_segments) as pooled:
            fine_tuning = super().loss_terms(engine, batch)
        total = reported = pooled[0].sum() * 0.0  # without pairs, the same graph
        if (sets := targets.contrast) is not None:
            dominant_CPH, other_CPH = gather_members(pooled, sets)[0][sets.pairs].unbind(dim=2)
            distance_C = (1 - F.cosine_similarity(dominant_CPH, other_CPH, dim=-1)).sum(dim=1)
            total, reported = total + distance_C.sum(), (distance_C * sets.is_reported).sum()
        return replace(
            fine_tuning, terms={**fine_tuning.terms, "distance": LossTerm(total, "pairs", self.weight, reported)}
        )
