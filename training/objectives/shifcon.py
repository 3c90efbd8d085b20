"""ShifCon (arXiv 2410.19453): shift hidden states towards the dominant language, contrast translations, shift back.

There is one forward pass per micro-batch: the fine-tuning forward is shifted, and the contrastive loss uses its hidden
states (docs/methods.md, section 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import merged
from data_pipeline.records import NO_LANGUAGE
from training.objectives.base import LossTerms, ObjectiveParts
from training.objectives.contrast import ContrastiveFineTuning, ContrastiveObjectiveConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import ChatBatch
    from modeling.shifcon.language_vectors import LanguageVectors, StateMeans
    from modeling.shifcon.normalisation import PooledMoments
    from training.engine.engine import Engine

AUTHORS_SHIFCON: Mapping[str, Any] = {
    "sft_weight": 0.5,
    "contrastive": {"weight": 2.0, "scale": 1.0, "set_size": 12, "normalise": "none"},
    "layers": (12, 15),
}


Estimator = Literal["token-means", "sentence-means", "normalised-sums"]


class ShifConConfig(ContrastiveObjectiveConfig):
    """ShifCon (arXiv 2410.19453): shift, contrast, shift back."""

    name: Literal["shifcon"]
    preset: Literal["authors"] | None = Field(
        None, description="'authors': their weights, scale, pairs and layers (12 to 15 of Llama-2-7B's 32), raw states"
    )
    layers: tuple[int, int] | Literal["auto"] = Field(
        description="[toward, back): states entering `toward` are shifted, `back` shifts back; auto: chosen by a probe"
    )
    shift: bool = Field(True, description="false: the contrastive loss alone, on states that are not shifted")
    strength: float = Field(1.0, gt=0, description="factor of the shift")
    strength_warmup_steps: int = Field(0, ge=0, description="steps over which `strength` rises linearly from 0")
    estimator: Estimator = Field(
        "token-means",
        description="of the language vectors: token-means; sentence-means: of each sample's mean over its own words; "
        "normalised-sums: the sum of these at length 1, as the authors' code has it, which grows with probe_items",
    )
    vector_momentum: float = Field(
        0.0, ge=0, lt=1, description="share of the vectors before in those after a refresh: running means"
    )
    random_vectors: bool = Field(False, description="ablation: shifts of the same lengths in random directions")
    shift_first_token: bool = Field(True, description="also shift a sequence's first token, an attention sink")

    fixed_keys: ClassVar[tuple[str, ...]] = (
        "objective.layers", "objective.shift", "data.languages", "data.dominant",
    )  # fmt: skip

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
        if not self.shift and not self.contrastive.weight:
            raise ValueError("'shift' is false and 'contrastive.weight' 0: use objective={name: sft}")
        if self.random_vectors and self.vector_momentum:
            raise ValueError("'random_vectors' have no running means: leave out 'vector_momentum'")
        return self

    @field_validator("layers")
    @classmethod
    def _ordered(cls, layers: tuple[int, int] | Literal["auto"]) -> tuple[int, int] | Literal["auto"]:
        if layers != "auto" and not 0 <= layers[0] < layers[1]:
            raise ValueError(f"must be [toward, back] with 0 <= toward < back, not {list(layers)}")
        return layers

    def probe_size(self) -> int:
        return self.probe_items if self.shift or self.normalises else 0

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        if self.layers != "auto" and self.layers[1] > n_layers:
            yield f"objective.layers: {list(self.layers)}, but the model has {n_layers} layers"

    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> ContrastiveFineTuning:
        area = self.area(model)
        if self.shift:
            return ShifCon(model, self, area, parts)
        return ContrastiveFineTuning(model, self, range(*area), parts)

    def area(self, model: PreTrainedModel) -> tuple[int, int]:
        """The layer area; with `auto`, before it is chosen, one of the right length in the middle of the model."""
        from modeling.layers import decoder_layers
        from modeling.shifcon.layer_area import candidates

        if self.layers != "auto":
            return self.layers
        found = candidates(len(decoder_layers(model)))
        return found[len(found) // 2]

    @property
    def wants_area(self) -> bool:
        return self.layers == "auto"

    def export(self, checkpoint: Path, output: Path) -> None:
        """The language vectors, bound to the exported weights by their hash."""
        from modeling.export_info import VECTORS_FILE
        from modeling.shifcon.language_vectors import LanguageVectors
        from modeling.weights.weight_files import directory_hash

        if self.shift:
            vectors = LanguageVectors.load(checkpoint / VECTORS_FILE)
            replace(vectors, model_hash=directory_hash(output)).save(output / VECTORS_FILE)

    def description(self) -> dict[str, Any]:
        return {"shifted": self.shift, "shift_first_token": self.shift_first_token}


@dataclass(frozen=True, slots=True)
class _ProbeMeans:
    """States entering `toward` and `back`, by language."""

    tokens: StateMeans
    texts: PooledMoments  # of each sample's mean over its own words
    directions: PooledMoments  # of these means at length 1

    def of_texts(self, dominant: int) -> tuple[Tensor, Tensor]:
        """`LanguageVectors.text_mean` and `text_deviation`; empty if the dominant language has fewer than two texts."""
        import torch

        from modeling.shifcon.normalisation import with_floor

        if self.texts.sentences[dominant] < 2:
            return torch.empty(0), torch.empty(0)
        deviation = with_floor(self.texts.variance()[dominant, 0].sqrt())
        return self.texts.mean[:, 0].float(), deviation.float()


class ShifCon(ContrastiveFineTuning):
    """Supervised fine-tuning with shifted states, and the contrastive loss over the plan's contrast sets."""

    def __init__(
        self, model: PreTrainedModel, config: ShifConConfig, area: tuple[int, int], parts: ObjectiveParts
    ) -> None:
        from modeling.shifcon.contrastive import ContentPooling
        from modeling.shifcon.shift import LanguageShift

        # Order matters: pooling must see the states after the shift.
        self.shift = LanguageShift(model, *area)
        super().__init__(model, config, range(*area), parts)
        self.texts = ContentPooling(model, area)
        self.config, self.area = config, area
        self.vectors: LanguageVectors | None = None

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        with self._shifting(batch):
            return super().loss_terms(engine, batch)

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        metrics = super().before_step(engine, step)
        assert self.vectors is not None
        strength = self.config.strength * min(1.0, (step + 1) / max(self.config.strength_warmup_steps, 1))
        if strength != self.vectors.strength:
            self.set_vectors(replace(self.vectors, strength=strength))
        return metrics

    def refresh(self, engine: Engine) -> dict[str, float]:
        """Estimates the language vectors on the probe set, then measures the restoration error of the shift.

        There are two passes over the probe set without gradients: unshifted for the vectors, shifted for the error and
        for the moments of the pooled states. Sums are in fp64 over all ranks (docs/methods.md, section 1.1).
        """
        from modeling.shifcon.language_vectors import random_directions, restoration_error

        before, momentum = self.vectors, self.config.vector_momentum
        with self.shift.disabled():
            found = self._means_over_probe(engine)
        mean = self._estimated(found)
        if before is not None and momentum:
            mean = momentum * before.mean + (1 - momentum) * mean
        text_mean, text_deviation = found.of_texts(self.languages.index(self.dominant))
        vectors = replace(
            found.tokens.vectors(
                self.languages, self.dominant, self.area, mean=mean, estimator=f"{self.config.estimator}, unshifted",
                strength=self.config.strength if before is None else before.strength,
            ),
            text_mean=text_mean,
            text_deviation=text_deviation,
        )  # fmt: skip
        self.set_vectors(random_directions(vectors) if self.config.random_vectors else vectors)
        shifted = self._means_over_probe(engine, normalise=self._normalises)
        error = restoration_error(vectors, self._estimated(shifted)[:, 1])
        metrics = {f"shift/restoration_error/{language}": value for language, value in error.items()}
        return metrics | {f"shift/norm/{name}": value for name, value in self.shift.shift_norms().items()}

    def set_vectors(self, vectors: LanguageVectors) -> None:
        """Sets the vectors of the shift."""
        self.vectors = vectors
        self.shift.set_vectors(vectors)

    def save(self, engine: Engine, directory: Path) -> None:
        from modeling.export_info import VECTORS_FILE
        from training.distributed import rank

        super().save(engine, directory)
        if self.vectors is not None and rank() == 0:
            self.vectors.save(directory / VECTORS_FILE)

    def load(self, directory: Path) -> None:
        from modeling.export_info import VECTORS_FILE
        from modeling.shifcon.language_vectors import LanguageVectors

        super().load(directory)
        self.set_vectors(LanguageVectors.load(directory / VECTORS_FILE))

    @property
    def _is_stale(self) -> bool:
        return self.vectors is None or super()._is_stale

    def _estimated(self, found: _ProbeMeans) -> Tensor:
        """(L, 2, H) fp32: the means at both ends of the area by the configured estimator."""
        if self.config.estimator == "token-means":
            return found.tokens.means()
        if self.config.estimator == "sentence-means":
            return found.texts.mean.float()
        return found.directions.sums().float()

    def _means_over_probe(self, engine: Engine, normalise: bool = False) -> _ProbeMeans:
        """Means of the states entering `toward` and `back`, by language, over the probe set of all ranks.

        Args:
            normalise: also measures the moments of the contrastive loss.
        """
        from modeling.shifcon.language_vectors import StateMeans
        from modeling.shifcon.normalisation import PooledMoments
        from training.distributed import all_sum

        moments = self._moments()
        texts, directions = (PooledMoments(len(self.languages), 2, self.texts.hidden_size) for _ in range(2))
        with StateMeans(engine.module, self.area, len(self.languages)) as means:
            measures = [
                self._shifting,
                lambda batch: means.batch(batch.targets.vector_languages),
                lambda batch: self._adding_texts(batch, texts, directions),
            ]
            if normalise:
                measures.append(lambda batch: self._adding(batch, moments))
            self.over_probe(engine, *measures)
        for total in (means.sums, means.norms, means.counts):
            total.copy_(all_sum(total, engine.device))
        if normalise:
            self._normalise_by(moments, engine)

        def over_ranks(own: PooledMoments) -> PooledMoments:
            return own.over_ranks(lambda values: all_sum(values, engine.device))

        return _ProbeMeans(means, over_ranks(texts), over_ranks(directions))

    @contextmanager
    def _adding_texts(self, batch: ChatBatch, texts: PooledMoments, directions: PooledMoments) -> Iterator[None]:
        from torch.nn import functional as F

        targets = batch.targets
        with self.texts.batch(targets.segment_ids, targets.content, targets.n_segments) as pooled:
            yield
        languages = targets.segment_languages.masked_fill(targets.segment_parallel, NO_LANGUAGE)
        texts.add(pooled, languages)
        directions.add([F.normalize(states, dim=1) for states in pooled], languages)

    def _shifting(self, batch: ChatBatch) -> AbstractContextManager[object]:
        return self.shift.batch(self._shifted_languages(batch))

    def _shifted_languages(self, batch: ChatBatch) -> Tensor:
        if self.config.shift_first_token:
            return batch.targets.languages
        assert batch.position_ids is not None  # conversations have them in both layouts
        return batch.targets.languages.masked_fill(batch.position_ids == 0, NO_LANGUAGE)
