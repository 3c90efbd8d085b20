"""ShifCon (arXiv 2410.19453): shift hidden states towards the dominant language, contrast translations, shift back.

There is one forward pass per micro-batch: the fine-tuning forward is shifted, and the contrastive loss uses its hidden
states (docs/methods.md, section 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import RowKind, merged
from data_pipeline.order.pairing import PairingRule
from data_pipeline.records import NO_LANGUAGE
from data_pipeline.settings import Section
from training.objectives.base import LossTerm, LossTerms, ObjectiveConfig, ObjectiveParts
from training.objectives.sft import SupervisedFineTuning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import ChatBatch, ContrastSets
    from modeling.shifcon.language_vectors import LanguageVectors, StateMeans
    from training.engine.engine import Engine


class ContrastiveConfig(Section):
    """The multilingual contrastive loss (docs/methods.md, section 1.3)."""

    weight: float = Field(ge=0, description="b of loss = a * SFT + b * contrastive")
    scale: float = Field(gt=0, description="factor of the cosine similarities; b is meaningful only together with it")
    set_size: int = Field(16, gt=1, description="pairs in a contrast set, whose samples may lie on several ranks")


AUTHORS_SHIFCON = {
    "sft_weight": 0.5,
    "contrastive": {"weight": 2.0, "scale": 1.0, "set_size": 12},
    "layers": (12, 15),
}


class ShifConConfig(ObjectiveConfig):
    """ShifCon (arXiv 2410.19453): shift, contrast, shift back."""

    name: Literal["shifcon"]
    preset: Literal["authors"] | None = Field(
        None, description="'authors': their weights, scale, pairs and layers (12 to 15 of Llama-2-7B's 32)"
    )
    layers: tuple[int, int] = Field(
        description="[toward, back): states entering `toward` are shifted, `back` shifts back"
    )
    sft_weight: float = Field(1.0, ge=0, description="a of loss = a * SFT + b * contrastive")
    contrastive: ContrastiveConfig
    probe_items: int = Field(64, gt=0, description="samples per language for the estimate of the language vectors")
    refresh_every: int = Field(100, gt=0, description="steps between two estimates of the language vectors")
    shift_first_token: bool = Field(True, description="also shift a sequence's first token, an attention sink")

    kinds: ClassVar[tuple[RowKind, ...]] = ("chat",)
    terms: ClassVar[tuple[str, ...]] = ("sft", "contrastive")
    fixed_keys: ClassVar[tuple[str, ...]] = ("objective.layers", "data.languages", "data.dominant")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "authors":
            return merged(AUTHORS_SHIFCON, values)
        return values

    @model_validator(mode="after")
    def _learns(self) -> ShifConConfig:
        if not self.sft_weight and not self.contrastive.weight:
            raise ValueError("'sft_weight' and 'contrastive.weight' are both 0: nothing would be trained")
        return self

    @field_validator("layers")
    @classmethod
    def _ordered(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= layers[0] < layers[1]:
            raise ValueError(f"must be [toward, back] with 0 <= toward < back, not {list(layers)}")
        return layers

    def pairing(self) -> PairingRule:
        return PairingRule(set_size=self.contrastive.set_size, needed=bool(self.contrastive.weight))

    def probe_size(self) -> int:
        return self.probe_items

    def mistakes(self, languages: Sequence[str], pairing: str) -> Iterator[str]:
        if pairing == "none" and self.contrastive.weight:
            yield "the contrastive loss needs pairs: set 'data.mixture.pairing' to 'reuse' or 'fill'"
        if len(languages) < 2:
            yield "objective 'shifcon' needs the dominant language and at least one other in 'data.languages'"

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        if self.layers[1] > n_layers:
            yield f"objective.layers: {list(self.layers)}, but the model has {n_layers} layers"

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> ShifCon:
        return ShifCon(model, self, parts.languages, parts.dominant, parts.probe)

    def export(self, checkpoint: Path, output: Path) -> None:
        """The language vectors, bound to the exported weights by their hash."""
        from modeling.export_info import VECTORS_FILE
        from modeling.shifcon.language_vectors import LanguageVectors
        from modeling.weights.weight_files import directory_hash

        vectors = LanguageVectors.load(checkpoint / VECTORS_FILE)
        replace(vectors, model_hash=directory_hash(output)).save(output / VECTORS_FILE)

    def description(self) -> dict[str, Any]:
        return {"shifted": True, "shift_first_token": self.shift_first_token}


class ShifCon(SupervisedFineTuning):
    """Supervised fine-tuning with shifted states, and the contrastive loss over the plan's contrast sets."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ShifConConfig,
        languages: Sequence[str],
        dominant: str,
        probe: Sequence[ChatBatch],
    ) -> None:
        from modeling.shifcon.contrastive import ContentPooling
        from modeling.shifcon.shift import LanguageShift

        super().__init__(model)
        toward, back = config.layers
        self.config = config
        self.sft_weight = config.sft_weight
        self.languages = tuple(languages)
        self.dominant = dominant
        self.probe = probe
        # Order matters: pooling must see the states after the shift.
        self.shift = LanguageShift(model, toward, back)
        self.pooling = ContentPooling(model, range(toward, back))
        self.vectors: LanguageVectors | None = None

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        with (
            self.shift.batch(self._shifted_languages(batch)),
            self.pooling.batch(batch.targets.segment_ids, batch.targets.content, batch.targets.n_segments) as pooled,
        ):
            fine_tuning = super().loss_terms(engine, batch)
        contrastive = self._contrastive(pooled, batch.targets.contrast)
        return replace(fine_tuning, terms={**fine_tuning.terms, "contrastive": contrastive})

    def _contrastive(self, pooled: Sequence[Tensor], sets: ContrastSets | None) -> LossTerm:
        """The loss of the sets in which this rank has a sample; each is reported by one rank.

        It depends on every pooled state, if only by a zero, so that all ranks have the same graph.
        """
        import torch

        from modeling.shifcon.contrastive import contrastive_losses
        from training.objectives.members import gather_members

        total = reported = torch.stack(list(pooled)).sum() * 0.0
        if sets is not None:
            scale = self.config.contrastive.scale
            losses_C = contrastive_losses(gather_members(pooled, sets), sets.pairs, sets.excluded, scale)
            total, reported = total + losses_C.sum(), (losses_C * sets.is_reported).sum()
        return LossTerm(total, "pairs", self.config.contrastive.weight, reported)

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        if step % self.config.refresh_every and self.vectors is not None:
            return {}
        return self.refresh(engine)

    def refresh(self, engine: Engine) -> dict[str, float]:
        """Estimates the language vectors on the probe set, then measures the restoration error of the shift.

        There are two passes over the probe set without gradients: unshifted for the vectors, shifted for the error.
        Sums are in fp64 over all ranks (docs/methods.md, section 1.1).
        """
        from modeling.shifcon.language_vectors import restoration_error

        with self.shift.disabled():
            unshifted = self._means_over_probe(engine)
        vectors = unshifted.vectors(self.languages, self.dominant, self.config.layers)
        self.set_vectors(vectors)
        shifted = self._means_over_probe(engine)
        error = restoration_error(vectors, shifted.means()[:, 1])
        metrics = {f"shift/restoration_error/{language}": value for language, value in error.items()}
        return metrics | {f"shift/norm/{name}": value for name, value in self.shift.shift_norms().items()}

    def set_vectors(self, vectors: LanguageVectors) -> None:
        """Sets the vectors of the shift."""
        self.vectors = vectors
        self.shift.set_vectors(vectors)

    def save(self, engine: Engine, directory: Path) -> None:
        from modeling.export_info import VECTORS_FILE
        from training.distributed import rank

        if self.vectors is not None and rank() == 0:
            self.vectors.save(directory / VECTORS_FILE)

    def load(self, directory: Path) -> None:
        from modeling.export_info import VECTORS_FILE
        from modeling.shifcon.language_vectors import LanguageVectors

        self.set_vectors(LanguageVectors.load(directory / VECTORS_FILE))

    def _means_over_probe(self, engine: Engine) -> StateMeans:
        """Mean states entering `toward` and `back`, by language, over every rank's share of the probe set."""
        import torch

        from modeling.shifcon.language_vectors import StateMeans
        from training.distributed import all_sum

        first = torch.zeros(1, dtype=torch.int64, device=engine.device)
        with (
            StateMeans(engine.module, self.config.layers, len(self.languages)) as means,
            engine.evaluating(),
            self.head.select(first),  # the logits are not used: one position is enough
        ):
            for batch in self.probe:
                on_device = batch.to(engine.device)
                with (
                    self.shift.batch(self._shifted_languages(on_device)),
                    means.batch(on_device.targets.vector_languages),
                ):
                    engine.forward(**on_device.model_inputs())
        for total in (means.sums, means.norms, means.counts):
            total.copy_(all_sum(total, engine.device))
        return means

    def _shifted_languages(self, batch: ChatBatch) -> Tensor:
        if self.config.shift_first_token:
            return batch.targets.languages
        assert batch.position_ids is not None  # conversations have them in both layouts
        return batch.targets.languages.masked_fill(batch.position_ids == 0, NO_LANGUAGE)
