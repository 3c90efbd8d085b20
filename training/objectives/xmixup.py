"""X-Mixup (arXiv 2205.04182): mixes the hidden states of a text at one layer with those of its partner text.

There is one forward pass per micro-batch, whose halves are the targets and their sources (docs/methods.md, section 2).

Shapes: R rows (n targets, then their n sources), T tokens, H hidden, N label units (rows or words).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from data_pipeline.config import RowKind
from data_pipeline.order.pairing import PairingRule
from training.objectives.base import LossTerm, LossTerms, ObjectiveConfig, ObjectiveParts
from training.objectives.finetune import TaskFineTuning, unit_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import TaskBatch
    from training.engine.engine import Engine


class XMixupConfig(ObjectiveConfig):
    """X-Mixup (arXiv 2205.04182): mixes hidden states of the target text with those of its source at one layer.

    The paper's ablations and the baseline translate-train + consistency are set by `mix`, `ratio`, `source_schedule`
    and `consistency_weight`.
    """

    name: Literal["xmixup"]
    layer: int = Field(ge=0, description="the encoder layer that mixes, 0-based; 0, 3, 15 for XLM-R large in the paper")
    alpha: float = Field(ge=0, le=1, description="loss = alpha * task(source) + (1 - alpha) * task(target) + ...")
    mix: bool = Field(True, description="false: both sides run, nothing is mixed (translate-train with consistency)")
    ratio: Literal["learned"] | float = Field(
        "learned", description="share of the cross-attention: learned from its entropy, or a fixed number"
    )
    max_ratio: float = Field(0.5, gt=0, le=1, description="lambda_0, the upper bound of the learned ratio")
    entropy: Literal["true", "authors"] = Field(
        "true", description="'authors': their masked-score form, which padding changes; only for comparison"
    )
    source_schedule: float | None = Field(
        1000.0,
        gt=0,
        description="k of scheduled sampling: a step's sources are gold with k / (k + exp(step / k)); null: always",
    )
    consistency_weight: float = Field(1.0, ge=0, description="weight of the consistency loss; 0: none")

    kinds: ClassVar[tuple[RowKind, ...]] = ("classification", "tagging", "qa")
    terms: ClassVar[tuple[str, ...]] = ("target", "source", "consistency", "mixup_ratio")

    @field_validator("ratio")
    @classmethod
    def _a_share(cls, ratio: str | float) -> str | float:
        if isinstance(ratio, float) and not 0 <= ratio <= 1:
            raise ValueError("must be 'learned' or a number from 0 to 1")
        return ratio

    def pairing(self) -> PairingRule:
        return PairingRule(with_partner=True, gold_schedule=self.source_schedule, needed=True)

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        if self.layer >= n_layers:
            yield f"objective.layer: {self.layer}, but the model has layers 0 to {n_layers - 1}"

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> XMixup:
        return XMixup(model, parts.kind, self, parts.special_ids)

    def export(self, checkpoint: Path, output: Path) -> None:
        """The settings and the learned ratio, bound to the exported weights by their hash."""
        from modeling.weights.weight_files import directory_hash
        from modeling.xmixup.mixup_state import MIXUP_FILE, MixupState

        mixup = MixupState.load(checkpoint / MIXUP_FILE)
        replace(mixup, model_hash=directory_hash(output)).save(output / MIXUP_FILE)

    def is_own_weight(self, name: str) -> bool:
        from modeling.xmixup.mixup_state import is_mixup_weight

        return is_mixup_weight(name)


class XMixup(TaskFineTuning):
    """`alpha * task(source) + (1 - alpha) * task(target) + consistency` (docs/methods.md, section 2.2).

    With back-translations as sources, whose labels are not gold, only the target's task loss is used, except in
    classification, where the label of both sides is the same. `train/loss` is the loss of the targets.
    """

    def __init__(self, model: PreTrainedModel, kind: RowKind, config: XMixupConfig, special_ids: Sequence[int]) -> None:
        from modeling.tasks.encoder_states import EncoderStates
        from modeling.xmixup.mixup import CrossLingualMixup

        self.kind = kind
        self.config = config
        self.special_ids = tuple(special_ids)
        self.states = EncoderStates(model)
        self.mixup = CrossLingualMixup(model, config.layer, config.max_ratio, config.entropy, config.ratio)

    def loss_terms(self, engine: Engine, batch: TaskBatch) -> LossTerms:
        import torch

        config, n = self.config, batch.targets.n_pairs
        with self.mixup.batch(batch.padding_mask, n, mix=config.mix), self.states.batch() as states:
            outputs = engine.forward(**batch.model_inputs())
        losses = unit_losses(outputs, batch)
        apart = self._consistency(states[self.states.last], outputs, batch)
        n_targets = batch.targets.n_target_labels
        target, source = losses[:n_targets], losses[n_targets:]
        labelled = batch.targets.gold or self.kind == "classification"
        alpha = config.alpha if labelled else 0.0
        real_n = real_rows(batch)[:n]
        ratio = self.mixup.last_ratio if config.mix and self.mixup.last_ratio is not None else torch.zeros_like(real_n)
        terms = {
            "target": LossTerm(target.sum(), denominator="target_labels", weight=1 - alpha),
            "source": LossTerm(source.sum(), denominator="source_labels", weight=alpha),
            "consistency": LossTerm((apart * real_n).sum(), denominator="pairs", weight=config.consistency_weight),
            "mixup_ratio": LossTerm((ratio * real_n).sum(), denominator="pairs", weight=0.0),
        }
        return LossTerms(target, batch.label_weights[:n_targets], batch.label_languages[:n_targets], terms)

    def saved_loss(self, engine: Engine, batch: TaskBatch) -> Tensor:
        with self.mixup.batch(batch.padding_mask, batch.targets.n_pairs, mix=self.config.mix):
            return super().saved_loss(engine, batch)

    def save(self, engine: Engine, directory: Path) -> None:
        """Writes the settings and the learned ratio for the export; a resume reads them from the engine's state."""
        from modeling.xmixup.mixup_state import MIXUP_FILE
        from training.distributed import rank
        from training.engine.engine import gathered

        with gathered(self.mixup.parameters()):
            state = self.mixup.state()
        if rank() == 0:
            state.save(directory / MIXUP_FILE)

    def _consistency(self, hidden_RTH: Tensor, outputs: Any, batch: TaskBatch) -> Tensor:
        """(n,) distance of the two sides of each pair."""
        from modeling.xmixup.consistency import consistency, content_mask, representations

        if self.kind == "classification":
            return consistency(representations(hidden_RTH), batch.targets.n_pairs, outputs.logits)
        content_RT = content_mask(batch.input_ids, batch.padding_mask, self.special_ids)
        return consistency(representations(hidden_RTH, content_RT), batch.targets.n_pairs)


def real_rows(batch: TaskBatch) -> Tensor:
    """(R,) 1 for rows with a label of weight above 0, 0 for those of an idle micro-batch."""
    import torch

    weights_R = batch.input_ids.new_zeros(len(batch.input_ids), dtype=torch.float32)
    return (weights_R.index_add(0, batch.targets.label_rows, batch.label_weights) > 0).float()
